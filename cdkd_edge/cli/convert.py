"""``cdkd-edge convert``: the same weights with cheaper attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer import BadParameter, Option

from cdkd_edge.cli.options import CHECKPOINT, HEADS, JSON, NORM_EPS, POOL_SCALES, TAPS, WEIGHTS, require_package
from cdkd_edge.cli.report import Report, Rows
from cdkd_edge.core.numbers import significant


def convert(
    checkpoint: Path = CHECKPOINT,
    *,
    attention: str | None = Option(
        None,
        help="Attention of the blocks: global, windowN or pooledN (N x N tokens). KIND/OTHER: OTHER in the four that "
        "feed the head; KIND/OTHER@5,11: in these; KIND,KIND,...: one for each.",
        metavar="SPEC",
    ),
    sparse: bool = Option(False, help="Prune proj, fc1 and fc2 to 2:4 sparsity, for `build --sparse`."),
    output: Path = Option(..., "--output", "-o", help="The checkpoint (.pt, .pth, .safetensors)."),
    tile: int | None = Option(None, help="Side of tiles, px. Default: the checkpoint's.", min=1),
    heads: int | None = HEADS,
    layer_norm_eps: float | None = NORM_EPS,
    taps: str | None = TAPS,
    pool_scales: str | None = POOL_SCALES,
    weights: str | None = WEIGHTS,
    overwrite: bool = Option(False, help="Replace an existing checkpoint."),
    as_json: bool = JSON,
) -> None:
    """Give a network windows, pooled keys or sparse weights. It labels worse until `distill` has recovered it.

    Or write another project's network as a checkpoint that says all of itself: its heads, taps and pooled sizes.
    """
    require_package("torch", "export", "converting")
    from cdkd_edge.core.files import sha256_of
    from cdkd_edge.model.checkpoint import load_checkpoint, load_encoder, save_checkpoint
    from cdkd_edge.model.config import attention_text
    from cdkd_edge.model.device import network_cost
    from cdkd_edge.model.sparsity import prune
    from cdkd_edge.training.files import require_free

    unsaid = {"heads": heads, "layer_norm_eps": layer_norm_eps, "taps": taps, "pool_scales": pool_scales}
    if attention is None and not sparse and all(value is None for value in unsaid.values()):
        raise BadParameter(
            "say what is to change: --attention, --sparse or both; or what the checkpoint does not say: --heads, "
            "--norm-eps, --taps, --pool-scales"
        )
    require_free(str(checkpoint), output, resume=False, overwrite=overwrite)
    reading: dict[str, Any] = {"tile": tile, "weights": weights, **unsaid}
    before, report = load_encoder(checkpoint, **reading)
    load = load_checkpoint if report.has_head else load_encoder
    macs = [network_cost(load(checkpoint, **reading)[0]).total_macs]
    network, report = load(checkpoint, attention=attention, **reading)
    macs.append(network_cost(network).total_macs)
    pruned = prune(network) if sparse else 0
    old, new = attention_text(before.config.attention), attention_text(report.config.attention)
    source = {"file": checkpoint.name, "sha256": sha256_of(report.path), "attention": old}
    training = {**report.training, "converted": {"from": source, "attention": new, "sparse": sparse}}
    save_checkpoint(network, output, schema=report.schema, training=training)

    rows: Rows = [
        ("attention", new),
        ("before", old),
        ("MACs in full", f"{significant(macs[1] / 1e9, 5)} G per tile, before {significant(macs[0] / 1e9, 5)} G"),
        *([("pruned", f"{pruned} layers: two of every four weights are zero")] if sparse else []),
        *(("note", note) for note in report.notes),
        ("next", f"cdkd-edge distill TILES --teacher {checkpoint} --student {output} -o RECOVERED")
        if attention or sparse
        else ("next", f"cdkd-edge export {output}"),
    ]
    data = {
        "path": output,
        "attention": list(report.config.attention),
        "config": report.config,
        "pruned_layers": pruned,
        "macs": macs[1],
        "macs_before": macs[0],
        "notes": report.notes,
    }
    Report(f"checkpoint {output}", rows, data).show(as_json)
