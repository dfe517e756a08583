"""python -m nlhf_kernels: which op runs on which backend here, or why not."""

import sys

import torch

from nlhf_kernels import __version__, registry


def main() -> None:
    out = sys.stdout.write
    out(f"nlhf_kernels {__version__}, torch {torch.__version__}\n")
    for op, backend, device, why in registry.table():
        out(f"{op:24} {backend:8} {device:6} {'no: ' + why if why else 'yes'}\n")
    for op in (*registry.OPS, *registry.LAYERS, *registry.UPDATES):
        for device in sorted({row[2] for row in registry.table()}):
            try:
                out(f"{op} on {device} uses {registry.resolve(op, device)}\n")
            except ValueError as error:
                # a choice made by NLHF_BACKEND
                out(f"{error}\n")


if __name__ == "__main__":
    main()
