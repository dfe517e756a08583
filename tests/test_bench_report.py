"""docs/benchmarks.md and the README's figures say what the committed rows say."""

import json
import re

import pytest

from bench import headline, plots, report, text

CPU, GPU = "Intel Xeon Processor, 2 cores", "NVIDIA H200"
README = "# top\n\n<!-- bench: begin -->\n<!-- bench: end -->\n\nbottom\n"
SETTING = {
    "model": "smollm2-135m", "B": 4, "P": 32, "T": 128, "dtype": "float32", "device": "cpu",
    "lora_r": 0, "temperature": 0.9, "mixture_coef": 0.5, "tau": 0.1, "learning_rate": 1e-6,
    "seed": 0,
}  # fmt: skip


def stamp(device=CPU, day=21):
    return {
        "run": f"2026-11-{day}T10:00:00+00:00", "commit": "0123456789ab", "dirty": False,
        "device": device, "threads": 2, "versions": {"python": "3.11.2", "torch": "2.13.0"},
    }  # fmt: skip


def op_row(
    variant, ms, /, *, op="mixture_sample", V=151_936, B=16, mode="fwd", peer=False, **other
):
    status = "ok" if ms else other.get("status", "missing")
    figures = {
        "ms": ms and [0.9 * ms, ms, 1.2 * ms], "calls": 20, "gbps": ms and 1e3 / ms, "tflops": None,
        "limit": "read", "share": ms and 3.456 / ms, "cpu_us": 12.34, "peak_mb": ms and 2.5 * ms,
    }  # fmt: skip
    return {
        **stamp(), "kind": "op", "op": op, "shape": f"model-{V // 1000}k, B={B}",
        "dims": {"B": B, "V": V}, "dtype": "float32", "mode": mode, "variant": variant,
        "peer": peer, "status": status, "note": "", **figures, **other,
    }  # fmt: skip


def sampling_row(variant, ms, /, *, V=151_936, B=16, **other):
    row = op_row(variant, ms, V=V, B=B)
    kind = {"kind": "sampling", "filters": "no filter", "logits": "N(0, 16)", "repeated": False}
    return {**row, **kind, "of_copy": 0.5, **other}


def memory_row(mb, **other):
    row = {**op_row("cpp", 1.0, V=256_000), "kind": "sampling memory", "filters": "no filter"}
    return row | {"logits": "N(0, 16)", "mb": mb, "floor_mb": 0.0, **other}


def step_row(variant, times, peak=1_000.0, /, **other):
    phases = dict(zip(("rollout", "scoring", "update", "step"), times or (), strict=False))
    return {
        **stamp(), "kind": "step", "setting": SETTING, "variant": variant,
        "status": "ok" if times else "missing", "note": "",
        "seconds": {k: [0.9 * v, v, 1.1 * v] for k, v in phases.items()} if times else None,
        "peak_mb": peak, "state_mb": 800.0, "tokens": 1_024, **other,
    }  # fmt: skip


def scaling_row(title, variant, exponent, x="B", y="ms", **other):
    xs = [1, 4, 16, 64]
    ys = [3.0 * n**exponent for n in xs]
    return {
        **stamp(), "kind": "scaling", "title": title, "x": x, "xs": xs, "y": y, "ys": ys,
        "variant": variant, "exponent": exponent, **other,
    }  # fmt: skip


def aot_row(kernel, dtype, **other):
    return {
        **stamp(), "kind": "aot", "kernel": kernel, "variant": "plain", "dtype": dtype,
        "arch": "sm_90", "registers": 74, "stack": 0, "spills": 0, "shared_bytes": 16_384,
        "load_bits": 128, "bound": "memory", "limit_gbps": 4_100.0, "limit_share": 0.854,
        "per_element": {"mufu": 1.0625, "fma": 4.25, "other": 9.5, "load": 0.125, "store": 0.0},
        "occupancy": 0.75, "triton": "3.9.0", **other,
    }  # fmt: skip


def limit_row(name, value, unit, **other):
    return {**stamp(), "kind": "limit", "name": name, "value": value, "unit": unit, **other}


def cpu_rows():
    error = "tokens differ from eager in 3 of 64 rows | first: row 5"
    rows = [
        limit_row("read", 23.456, "GB/s"),
        limit_row("gemm float32", 0.1234, "TFLOP/s"),
    ]
    for V in (49_152, 151_936):
        for B in (1, 16, 64):
            k = V * B / 1e5
            rows += [
                op_row("cpp", 0.31 * k, V=V, B=B),
                op_row("eager", 2.9 * k, V=V, B=B),
                op_row("Hugging Face path", 3.1 * k, V=V, B=B, peer=True),
                op_row("FlashInfer", None, V=V, B=B, peer=True, note="needs CUDA"),
            ]
    rows += [op_row("torch.compile", None, peer=True, status="wrong", note=error)]
    for mode, k in (("fwd", 1), ("bwd", 2), ("fwd+bwd", 3)):
        loss = {"op": "pairwise_pg_loss", "mode": mode}
        # a peer that wins
        rows += [
            op_row("cpp", 20.0 * k, **loss),
            op_row("eager", 55.0 * k, **loss),
            op_row("Liger-Kernel", 16.0 * k, peer=True, **loss),
        ]
    rows += [
        op_row("cpp", 210.0, op="linear_token_logprobs", mode="fwd+bwd"),
        op_row("Cut Cross Entropy", 333.0, op="linear_token_logprobs", mode="fwd+bwd", peer=True),
        step_row("nlhf", (10.0, 0.5, 2.0, 12.5)),
        step_row("plain loop", (15.0, 0.8, 2.4, 18.2), 1_500.0),
        step_row("bare forwards", (9.6,), None),
        step_row("trl 1.13.0", (150.0, 1.0, 4.0, 155.0), 2_600.0, **stamp(day=20)),
        step_row("trl 1.13.0, use_cache", None, None, status="wrong", note="off by 5.1 nats"),
        step_row("rlhf", (8.0, 0.3, 2.0, 10.3), 900.0),
        scaling_row("mixture_sample against B", "cpp", 0.98),
        scaling_row("mixture_sample against B", "eager", 1.31),
        scaling_row("memory of a step against T", "nlhf", 0.4, x="T", y="MB"),
        scaling_row("memory of a step against T", "plain loop", 0.9, x="T", y="MB"),
        aot_row("row_statistics_kernel", "float32"),
        aot_row("row_statistics_kernel", "bfloat16", registers=60, bound="MUFU"),
        aot_row("row_statistics_kernel", "float32", arch="sm_80", registers=99),
    ]
    for V in (32_000, 151_936, 256_000):
        for filters, logits, ms in (
            ("no filter", "N(0, 16)", (1.0, 101.0, 5.0)),
            ("top-p 0.9", "N(0, 16)", (1.0, 149.0, 7.0)),
            ("top-p 0.9", "N(0, 1)", (4.0, 160.0, 7.0)),
        ):
            at = {"V": V, "filters": filters, "logits": logits}
            rows += [
                sampling_row("cpp", ms[0], **at),
                sampling_row("Hugging Face path", ms[1], peer=True, **at),
                sampling_row("yardstick: two logsumexp (no draw)", ms[2], peer=True, **at),
            ]
    return [*rows, memory_row(0.5), memory_row(2.5, logits="N(0, 1)", filters="top-p 0.9")]


def gpu_rows():
    at = stamp(GPU)
    bigger = SETTING | {"model": "llama3-8b", "device": "cuda", "lora_r": 16, "dtype": "bfloat16"}
    return [
        limit_row("copy", 4_321.0, "GB/s", **at),
        op_row("triton", 0.0456, graph_ms=[0.03, 0.0333, 0.04], **at),
        op_row("eager", 1.23, **at),
        op_row("FlashInfer", 0.0789, peer=True, **at),
        step_row("nlhf", (5.0, 0.25, 1.0, 6.25), 40_000.0, **at | {"setting": bigger}),
        step_row("nlhf, CUDA graphs", (2.5, 0.25, 1.0, 3.75), 41_000.0, **at | {"setting": bigger}),
        step_row(
            "reading weights and caches",
            (2.0,),
            None,
            **at | {"setting": bigger, "note": "at 4,321 GB/s"},
        ),
        step_row("trl 1.13.0", (150.0, 1.0, 4.0, 155.0), 60_000.0, **at | {"setting": bigger}),
        # what a run writes beside its figures
        {**at, "kind": "part", "part": "ops", "status": "done", "seconds": 1.0},
        scaling_row("mixture_sample against V", "triton", 1.02, x="V", **at),
    ]


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


class Tree:
    """A repository with nothing but rows and a README."""

    def __init__(self, path):
        self.path, self.results = path, path / "results"
        self.results.mkdir()
        (path / "README.md").write_text(README, encoding="utf-8")

    def write(self, rows, name="cpu.jsonl"):
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (self.results / name).write_text(text, encoding="utf-8")

    def run(self, *flags):
        return report.main(["--results", str(self.results), "--output", str(self.path), *flags])

    def page(self, rows=None):
        if rows is not None:
            self.write(rows)
            assert self.run() == 0
        return (self.path / "docs" / "benchmarks.md").read_text(encoding="utf-8")

    def readme(self):
        return (self.path / "README.md").read_text(encoding="utf-8")


def section(page, heading):
    """From a heading to the next one."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page, flags=re.M | re.S)
    return found


def line_of(page, start):
    (found,) = [x for x in page.splitlines() if x.startswith(start)]
    return found


def test_the_committed_page_is_that_of_the_committed_rows(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_without_rows_the_page_says_so(tree):
    page = tree.page([])
    assert "Nothing has been measured yet" in page
    assert "nothing has been measured" in tree.readme()
    assert "GPU figures are not measured." in tree.readme()
    assert not list(tree.path.glob("docs/benchmarks/*"))
    assert tree.run("--check") == 0


def test_the_same_rows_give_the_same_bytes(tree):
    rows = cpu_rows() + gpu_rows()
    page, readme = tree.page(rows), tree.readme()
    assert tree.run("--check") == 0
    assert readme.startswith("# top\n")
    assert readme.endswith("\nbottom\n")
    assert tree.page(rows[::-1]) == page
    assert tree.readme() == readme
    assert {p.stem for p in tree.path.glob("docs/benchmarks/*.png")} == set(plots.NAMES)


@pytest.mark.parametrize(
    ("row", "changed"),
    [
        (op_row("cpp", 7.0), ["README.md", "docs/benchmarks.md", "docs/benchmarks/ops.png"]),
        (step_row("nlhf", (9.0, 0.5, 2.0, 11.5)),
         ["README.md", "docs/benchmarks.md", "docs/benchmarks/step.png"]),
        (scaling_row("mixture_sample against B", "cpp", 0.9),
         ["docs/benchmarks.md", "docs/benchmarks/scaling.png"]),
        (scaling_row("memory of a step against T", "nlhf", 0.5, x="T", y="MB"),
         ["docs/benchmarks.md", "docs/benchmarks/memory.png"]),
        (aot_row("row_statistics_kernel", "float32", registers=75), ["docs/benchmarks.md"]),
        (sampling_row("cpp", 2.0), ["docs/benchmarks.md", "docs/benchmarks/sampling.png"]),
        (memory_row(0.6), ["docs/benchmarks.md"]),
        (limit_row("read", 20.0, "GB/s"), ["docs/benchmarks.md"]),
    ],
    ids=lambda x: x["kind"] if isinstance(x, dict) else "",
)  # fmt: skip
def test_check_names_the_files_that_a_new_row_changes(tree, capsys, row, changed):
    # of the ops the one shape that changes, so that it is the one in the README
    rows = [r for r in cpu_rows() if r["kind"] != "op" or r["dims"] == {"B": 16, "V": 151_936}]
    tree.page(rows)
    tree.write([*rows, row])
    capsys.readouterr()
    assert tree.run("--check") == 1
    assert [x.split()[0] for x in capsys.readouterr().out.splitlines()] == changed


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_check_sees_a_number_changed_by_hand(tree, capsys, name):
    tree.page(cpu_rows())
    path = tree.path / name
    said = path.read_text(encoding="utf-8")
    assert "12.5" in said
    path.write_text(said.replace("12.5", "11.5", 1), encoding="utf-8")
    capsys.readouterr()
    assert tree.run("--check") == 1
    assert capsys.readouterr().out.startswith(name)
    # and it wrote nothing
    assert "11.5" in path.read_text(encoding="utf-8")


def test_check_sees_images_that_are_gone_foreign_or_left_over(tree, capsys):
    tree.page(cpu_rows())
    folder = tree.path / "docs" / "benchmarks"
    (folder / "ops.png").unlink()
    (folder / "step.png").write_bytes(b"not an image")
    from matplotlib.figure import Figure

    Figure().savefig(folder / "scaling.png")
    capsys.readouterr()
    assert tree.run("--check") == 1
    named = [x.split()[0] for x in capsys.readouterr().out.splitlines()]
    assert named == [f"docs/benchmarks/{n}.png" for n in ("ops", "scaling", "step")]
    assert tree.run() == 0
    tree.write([r for r in cpu_rows() if r["kind"] != "step"])
    assert tree.run() == 0
    assert not (folder / "step.png").exists()


@pytest.mark.parametrize("latest_first", [False, True])
def test_the_latest_run_counts(tree, latest_first):
    old = op_row("cpp", 1.0, **stamp(day=20))
    new = op_row("cpp", 2.0, **stamp(day=22))
    page = tree.page([new, old] if latest_first else [old, new])
    assert "2.00 ms" in page
    assert "1.00 ms" not in page
    assert "2026-11-22" in page
    assert "2026-11-20" not in page


def test_a_later_failure_hides_an_earlier_number(tree):
    old = op_row("cpp", 7.77, **stamp(day=20))
    page = tree.page([old, op_row("cpp", None, status="wrong", note="NaN", **stamp(day=22))])
    assert "7.77" not in page
    assert "cpp, wrong: NaN" in page


def test_wrong_and_missing_rows_have_a_reason_and_no_number(tree):
    rows = cpu_rows()
    # a number that should not have been there is not shown either
    wrong = next(r for r in rows if r.get("variant") == "torch.compile")
    wrong["ms"] = [0.0777, 0.0777, 0.0777]
    page = tree.page(rows)
    assert "0.0777" not in page
    # nor does it take the bold from the fastest correct one
    assert "| **7.54 ms**" in section(page, "`mixture_sample`")
    cells = line_of(page, "| torch.compile (peer)").split(" | ")
    assert "wrong" in cells
    assert not re.search(r"\d", "".join(cells))
    assert r"tokens differ from eager in 3 of 64 rows \| first: row 5" in page
    assert "model-151k, B=16, float32, fwd" in line_of(page, "- torch.compile (peer), wrong:")
    assert "| FlashInfer" not in page
    missing = section(page, "What is missing, and why")
    assert "- FlashInfer (peer), missing: needs CUDA (`mixture_sample` on Intel" in missing
    cached = line_of(page, r"| trl 1.13.0, use\_cache |")
    assert cached.split("|")[2].strip() == "wrong"
    assert not re.search(r"\d", cached.replace("1.13.0", ""))
    assert "off by 5.1 nats" in page


def test_the_fastest_correct_variant_is_bold_whoever_it_is(tree):
    page = tree.page(cpu_rows())
    loss = section(page, "`pairwise_pg_loss`")
    bold = [x.split(" | ")[0] for x in loss.splitlines() if "**" in x and x.startswith("| ")]
    assert bold == ["| Liger-Kernel (peer)"] * 3
    assert "**16.0 ms**" in loss
    sampling = section(page, "`mixture_sample`")
    assert len(re.findall(r"\*\*[\d.,]+ ms\*\*", sampling)) == 6
    assert sampling.count("**") == 2 * 6 + 2
    # and in the README
    row = line_of(tree.readme(), "| `pairwise_pg_loss`")
    assert "Liger-Kernel **48.0 ms** (0.800 x)" in row
    assert "60.0 ms, 5.76 % of read" in row


def test_ratios_and_memory_of_a_step(tree):
    page = tree.page(cpu_rows())
    ours = [x.strip() for x in line_of(page, "| nlhf |").split("|")[1:-1]]
    want = ["nlhf", "10.0", "0.500", "2.00", "**12.5**", "15.0", "12.4", "1.04", "1,000", "200"]
    assert ours == want
    assert "| bare forwards | 9.60 | - | - | - | 15.6 | - | 1.00 | - | - |" in page
    assert "Not all from one run: trl 1.13.0 (2026-11-20" in page
    rlhf = section(page, "NLHF against RLHF")
    assert "| 12.5 | 10.3 | 1.21 | 1,000 | 900 | 1.11 |" in rlhf
    readme, setting = tree.readme(), "smollm2-135m, B=4, P=32, T=128, float32"
    for what, cells in (
        ("rollout", "**10.0 s** | 15.0 s (1.50 x) | 150 s (15.0 x)"),
        ("whole step", "**12.5 s** | 18.2 s (1.46 x) | 155 s (12.4 x)"),
        ("peak memory", "**1,000 MB** | 1,500 MB (1.50 x) | 2,600 MB (2.60 x)"),
    ):
        assert f"| {what}<br>{setting} | {cells} |" in readme


def test_growth_worse_than_linear_is_marked(tree):
    table = section(tree.page(cpu_rows()), "Scaling")
    assert "| **1.31** | worse than linear |" in line_of(
        table, "| mixture\\_sample against B | eager"
    )
    assert "| 0.980 |  |" in line_of(table, "| mixture\\_sample against B | cpp")


def test_ahead_of_time_rows_are_predictions(tree):
    page = tree.page(cpu_rows())
    table = section(page, "Prediction for sm_90, ahead of time")
    assert "Nothing here was measured" in table
    row = line_of(table, "| `row_statistics_kernel` | plain | float32")
    want = "74 | 0 | 16,384 | 128 | 1.06 | 4.25 | memory | 4,100 | 85.4 % |"
    assert row.endswith(want)
    # another architecture is not mixed in
    assert "| 99 |" not in page
    # and none of it is said of a machine
    alone = tree.page([r for r in cpu_rows() if r["kind"] == "aot"])
    assert CPU not in alone
    assert "CPU: not measured." in section(alone, "Machines")


SECTIONS = ("Machines", "`mixture_sample`", "A whole training step", "NLHF against RLHF", "Scaling")


def test_a_device_without_rows_is_not_measured(tree):
    page = tree.page(cpu_rows())
    for heading in SECTIONS:
        assert "GPU: not measured." in section(page, heading)
    assert "Every figure on a GPU" in section(page, "What is missing, and why")
    assert "GPU figures are not measured." in tree.readme()
    tree.write(gpu_rows(), "nvidia-h200.jsonl")
    assert tree.run() == 0
    page = tree.page()
    for heading in SECTIONS:
        assert "GPU: not measured." not in section(page, heading)
        assert f"**{GPU}**" in section(page, heading)
        assert f"**{CPU}**" in section(page, heading)
    assert "Every figure on a GPU" not in page
    assert "not measured" not in tree.readme()
    for device in (CPU, GPU):
        assert f"**{device}**\n\n| op | ours | eager | fastest peer |" in tree.readme()


def test_a_gpu_shows_graphs_and_the_time_of_the_caller(tree):
    page = tree.page(gpu_rows())
    assert "**0.0456 ms** (graph 0.0333)" in page
    assert "12.3 us of CPU a call" in page
    assert "CPU: not measured." in section(page, "Machines")
    assert "llama3-8b, B=4, P=32, T=128, bfloat16, lora\\_r=16:" in page


def test_graphs_and_the_time_of_reading(tree):
    page = tree.page(gpu_rows())
    row = line_of(page, "| nlhf, CUDA graphs |")
    assert row.split(" | ")[4:8] == ["**3.75**", "60.0", "41.3", "1.25"]
    assert "rollout over<br>reading weights and caches" in page
    assert "- reading weights and caches: at 4,321 GB/s" in page
    assert "| **3.75 s** | - | 155 s (41.3 x) |" in tree.readme()


GOOD = json.dumps(limit_row("read", 1.0, "GB/s"))
NO_NOTE = {k: v for k, v in op_row("cpp", 1.0).items() if k != "note"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({"kind": "opinion"}), "unknown kind 'opinion'"),
        (json.dumps({"run": "x"}), "unknown kind None"),
        (json.dumps(NO_NOTE), "no field note"),
        (json.dumps(op_row("cpp", 1.0, status="fine")), "status 'fine'"),
        (json.dumps(op_row("cpp", 1.0, ms=None)), "a time must be [min, median, max]"),
        (json.dumps(op_row("cpp", 1.0, ms=[1, 2])), "a time must be [min, median, max]"),
        (json.dumps(op_row("cpp", 1.0, ms=[1, float("nan"), 2])), "a time must be"),
        (json.dumps(op_row("cpp", 1.0, mode="sideways")), "mode 'sideways'"),
        (json.dumps(op_row("cpp", 1.0, dims=[64])), "dims must be"),
        (json.dumps(step_row("nlhf", (1.0,), seconds=[1.0])), "seconds must be"),
        (json.dumps(step_row("nlhf", (1.0,), setting={"model": "tiny"})), "setting has no B"),
        (json.dumps(scaling_row("t", "cpp", 1.0, xs=[])), "xs and ys"),
        (json.dumps(aot_row("k", "float32", per_element={})), "per_element has no mufu"),
    ],
)
def test_bad_rows_are_named(tree, capsys, line, says):
    (tree.results / "cpu.jsonl").write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    assert tree.run() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cpu.jsonl:2: " in error
    assert says in error
    assert tree.readme() == README


def test_bad_places_are_named(tree, capsys):
    assert report.main(["--pixels"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert report.main(["--results", str(tree.path / "none"), "--output", str(tree.path)]) == 2
    assert "none is not a folder" in capsys.readouterr().err
    for readme in ("no markers", f"{headline.END} {headline.BEGIN}"):
        (tree.path / "README.md").write_text(readme, encoding="utf-8")
        assert tree.run() == 2
        assert "README.md" in capsys.readouterr().err
    (tree.path / "README.md").unlink()
    assert tree.run() == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "-"), (0.0, "0"), (1.0, "1.00"), (0.00012345, "0.000123"), (9.999, "10.0"),
     (999.6, "1,000"), (123_456.0, "123,000"), (-1.5, "-1.50"), (151_936, "151,936")],
)  # fmt: skip
def test_numbers_have_three_digits(value, said):
    assert text.number(value) == said
