"""A plan as a person reads it, in 80 columns."""

from __future__ import annotations

import textwrap

from dualenc.plan.planning import RESERVE, Need, Planned, keys_of, micros

HEADS = ("weights", "grads", "optim", "activ", "loss", "buffers", "total")
WIDTH = 80


def size(n: float) -> str:
    """Bytes in GiB or MiB, in at most seven characters.

    >>> size(3 * 2**30), size(5.5 * 2**20), size(0)
    ('3.0 G', '6 M', '0')
    """
    if n < 2**19:
        return "0"
    if n < 999.5 * 2**20:
        return f"{n / 2**20:.0f} M"
    return f"{n / 2**30:.1f} G" if n < 999.5 * 2**30 else f"{n / 2**30:.0f} G"


def printed(planned: Planned) -> str:
    """The tables, the recommendation, and the keys to write."""
    recipe, w = planned.recipe, planned.weights
    local = recipe.batch.size // planned.ranks
    model = f"{recipe.name}: {w.total / 1e6:,.1f} M parameters, {w.trained / 1e6:,.1f} M of them trained"
    model += f", {recipe.engine.precision}" + (", checkpointing" if recipe.engine.grad_checkpointing else "")
    share = f"global batch {recipe.batch.size:,} on {planned.ranks} rank(s): {local:,} samples each"
    device = f"{size(planned.memory)}iB a device, of which {size(planned.usable)}iB are planned"
    told = [*_said(planned), *planned.notes]
    said = [line for x in told for line in textwrap.wrap(x, WIDTH, break_on_hyphens=False)]
    return "\n".join([model, share, device, "", *_totals(planned, local), "", *_parts(planned, local), "", *said])


def _totals(planned: Planned, local: int) -> list[str]:
    sizes = micros(local)
    title = "peak memory of a rank by micro-batch (M: MiB, G: GiB, *: does not fit)"
    lines = [title, f"{'engine':<12}" + "".join(f"{m:>10,}" for m in sizes)]
    for name in dict.fromkeys(n.kind.name for n in planned.needs):
        row = {n.micro: n for n in planned.needs if n.kind.name == name}
        cells = (size(row[m].total) + (" " if planned.fits(row[m]) else "*") for m in sizes)
        lines.append(f"{name:<12}" + "".join(f"{c:>10}" for c in cells).rstrip())
    return lines


def _parts(planned: Planned, local: int) -> list[str]:
    """Of each engine at its largest micro-batch that fits (or the smallest planned), what makes the peak."""
    lines = [
        "at the largest micro-batch that fits, or the smallest",
        f"{'engine':<12}{'micro':>5}" + "".join(f"{h:>8}" for h in HEADS),
    ]
    shown = []
    for name in dict.fromkeys(n.kind.name for n in planned.needs):
        row = [n for n in planned.needs if n.kind.name == name]
        need = next((n for n in row if planned.fits(n)), row[-1])
        shown.append(need)
        cells = [need.parameters, need.gradients, need.optimizer, need.activations + need.features]
        cells += [need.loss, need.working, need.total]
        lines.append(f"{name:<12}{need.micro:>5}" + "".join(f"{size(c):>8}" for c in cells))
    lines += ["", "sent by a rank in a step (ring collectives)"]
    lines.append(f"{'engine':<12}{'micro':>5}{'gradients':>12}{'weights':>10}{'features':>10}{'total':>10}")
    for need in shown:
        x = need.wire
        sent = f"{size(x.gradients):>12}{size(x.parameters):>10}{size(x.features):>10}{size(x.total):>10}"
        lines.append(f"{need.kind.name:<12}{need.micro:>5}{sent}")
    lines += ["", f"batches that data workers hold ready: {size(planned.host)}iB of host memory on a machine"]
    return lines


def _said(planned: Planned) -> list[str]:
    need = planned.chosen
    if need is not None:
        return [_recommended(need, planned), f"write: {' '.join(keys_of(need, planned))}"]
    near = planned.nearest
    lines = [
        f"Nothing fits: {near.kind.name} at micro-batch {near.micro} comes nearest with {size(near.total)}iB, "
        f"{size(near.total - planned.usable)}iB too much."
    ]
    for said, n in planned.helps:
        lines.append(
            f"With {said}, {n.kind.name} fits at micro-batch {n.micro} ({size(n.total)}iB): "
            f"write {said} {' '.join(keys_of(n, planned))}"
        )
    if not planned.helps:
        lines.append(_advice(near, planned))
    return lines


def _recommended(need: Need, planned: Planned) -> str:
    local = planned.recipe.batch.size // planned.ranks
    whole = need.micro >= local
    how = "the whole batch at once" if whole else f"micro-batches of {need.micro} (each encoded twice)"
    where = "" if planned.ranks == 1 else f" and sends {size(need.wire.total)}iB a step"
    return (
        f"Use {need.kind.name} with {how}: a rank needs {size(need.total)}iB of the {size(planned.usable)}iB "
        f"({100 * (1 - RESERVE):.0f} % of the device){where}."
    )


def _advice(need: Need, planned: Planned) -> str:
    """What to change when the engine's own settings are not enough."""
    kept = need.parameters + need.optimizer + need.gradients + need.working
    if kept > planned.usable:
        return (
            f"Weights, gradients, optimizer and buffers alone take {size(kept)}iB: use more ranks with FSDP2 or "
            "ZeRO 3, devices with more memory, a smaller encoder, or lock a tower."
        )
    if need.loss > need.activations:
        return "The loss takes most of it: use loss.impl=tiled, loss.columns=ring, or a smaller batch.size."
    return "Activations take most of it: use a smaller input, a smaller encoder, or devices with more memory."
