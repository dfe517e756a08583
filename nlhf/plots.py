"""The curves of a run as one PNG."""

from pathlib import Path

_PANELS = (
    ("preference_vs_ref", "preference against the reference\n(held-out prompts)"),
    ("preference", "P(y > y'), the opponent is the mixture"),
    ("kl", "KL to the reference, nats a completion"),
    ("entropy", "entropy, nats a token"),
)


def curves(metrics: list[dict], path: Path) -> None:
    """Plot the metrics of every step (as read from metrics.jsonl) over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    for axis, (name, title) in zip(axes.flat, _PANELS, strict=True):
        points = [(m["step"], m[name]) for m in metrics if name in m]
        marker = "o" if len(points) < 30 else ""
        axis.plot(*zip(*points, strict=True) if points else ([], []), marker=marker)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if name.startswith("preference"):
            axis.axhline(0.5, color="grey", linewidth=0.8)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
