"""Teacher, student and what is trained beside them, as one module that gives the losses of a batch (torch)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cdkd_edge.core.errors import CheckpointError, UsageError
from cdkd_edge.distillation.adapters import Mixture
from cdkd_edge.distillation.autoencoder import Reconstruction, patch_values, reconstruction_loss
from cdkd_edge.distillation.recipe import FEATURES, MASKED, DistillRecipe
from cdkd_edge.distillation.teacher import quarter_pairs
from cdkd_edge.model.device import autocast
from cdkd_edge.model.network import Encoder, SegmentationNetwork

LOSSES = ("distillation", "teacher_pixels", "student_pixels", "classes")
_LEAST_VARIANCE = 1e-4  # of the mean of a map's channels: what a channel that hardly varies is divided by

Network = SegmentationNetwork | Encoder


class Losses(NamedTuple):
    """What a batch gives; the parts that a method does not have are 0."""

    parts: Tensor  # [4], in the order of LOSSES
    missed: Tensor  # [P], distillation by pair of blocks
    spread: Tensor  # [P], standard deviation of the teacher's features over that without adapters
    agreement: Tensor  # scalar, share of cells with the teacher's label; 0 without heads


def encoder_of(network: Network) -> Encoder:
    """The encoder of a network, or the encoder itself."""
    return network.encoder if isinstance(network, SegmentationNetwork) else network


def kept(tokens: Tensor, visible: Tensor | None, first: int) -> Tensor:
    """The visible tokens ``[N, V, D]`` of ``[N, L, D]``; the ``first`` ones, of no patch, always stay in front."""
    if visible is None:
        return tokens
    chosen = tokens.gather(1, (visible + first)[..., None].expand(-1, -1, tokens.shape[-1]))
    return torch.cat([tokens[:, :first], chosen], dim=1) if first else chosen


class AdaptedTeacher(nn.Module):
    """A frozen encoder with adapters beside the MLP of every block.

    Args:
        encoder: a :class:`~cdkd_edge.model.sam.SamEncoder` or an :class:`~cdkd_edge.model.network.Encoder`.
        gate: see :class:`.adapters.Mixture`. None: no adapters.
        recompute: compute the blocks again in the backward pass, which saves the memory of their activations.
    """

    def __init__(self, encoder: Any, gate: str | None, *, recompute: bool = False) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.recompute = recompute
        width = encoder.config.embed_dim
        self.mixtures = nn.ModuleList(Mixture(width, gate) for _ in encoder.blocks) if gate else None

    def run(self, tokens: Tensor, wanted: Collection[int], turn: Tensor | None = None) -> list[Tensor]:
        """The tokens ``[N, V, D]`` after each wanted block (0-based); all tokens of a tile, or those of a mask.

        ``turn``: their rotary positions (:meth:`.network.Encoder.turn`).
        """
        if self.mixtures is None:
            return self.encoder.run(tokens, wanted, turn)  # type: ignore[no-any-return]
        found = []
        for index in range(max(wanted) + 1):
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(self._adapted, index, tokens, turn, use_reentrant=False)
            else:
                tokens = self._adapted(index, tokens, turn)
            if index in wanted:
                found.append(tokens)
        return found

    def _adapted(self, index: int, tokens: Tensor, turn: Tensor | None) -> Tensor:
        assert self.mixtures is not None
        block, first = self.encoder.blocks[index], self.encoder.config.extra_tokens
        tokens = block.attend(tokens, turn)
        normal = block.norm2(tokens)
        known = block.mlp(normal)
        added = self.mixtures[index](normal[:, first:], known[:, first:])
        return tokens + (torch.cat([known[:, :first], added], dim=1) if first else added)


class Distillation(nn.Module):
    """All that takes part in a step; the forward pass gives the losses of a batch of tiles.

    Args:
        student: an encoder, or a network with a head; only its encoder is trained.
        teacher: an encoder, or a network whose head is compared too. None for method ``mae``.
        recipe: see there.
        position: whether the student's position embedding is trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        student: Network,
        teacher: Any | None,
        recipe: DistillRecipe,
        *,
        position: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.student = student.requires_grad_(False).eval()
        encoder = encoder_of(student)
        guide = teacher.encoder if isinstance(teacher, SegmentationNetwork) else teacher
        _require_comparable(recipe, encoder, guide)
        self.teacher = None if guide is None else AdaptedTeacher(guide, recipe.gate_used, recompute=recompute)
        self.pairs = () if guide is None else _pairs(recipe, guide, encoder)
        self.with_classes = recipe.method == FEATURES and recipe.logits > 0 and _have_heads(student, teacher)
        # In a list, and so not a part of this module, which has its encoder already.
        self._heads: list[SegmentationNetwork] = []
        if self.with_classes and isinstance(teacher, SegmentationNetwork):
            self._heads.append(teacher.requires_grad_(False).eval())
        last = encoder.config.depth if recipe.masked or self.with_classes else max(ours for _, ours in self.pairs)
        for part in (encoder.patch_embed, *encoder.blocks[:last]):
            part.requires_grad_(True)
        for name in ("pos_embed", "cls_token", "registers"):
            if hasattr(encoder, name):
                getattr(encoder, name).requires_grad_(position)
        width, theirs = encoder.config.embed_dim, guide.config.embed_dim if guide is not None else 1
        self.projections = nn.ModuleList(
            nn.Identity() if recipe.projection == "none" else nn.Linear(width, theirs, bias=False) for _ in self.pairs
        )
        options = (recipe.decoder_width, recipe.decoder_depth)
        self.student_decoder = self.teacher_decoder = None
        tile, patch = encoder.config.tile, encoder.config.patch
        if recipe.masked:
            self.student_decoder = Reconstruction(width, tile, patch, *options)
        if self.teacher is not None and self.teacher.mixtures is not None:
            self.teacher_decoder = Reconstruction(theirs, tile, patch, *options)
        self.register_buffer("mean", torch.zeros(len(self.pairs), theirs))
        self.register_buffer("std", torch.ones(len(self.pairs), theirs))

    def trained(self) -> nn.ModuleDict:
        """What changes in a run, and so belongs to its state: all but the frozen teacher and the heads."""
        parts: dict[str, nn.Module | None] = {
            "student": encoder_of(self.student),
            "mixtures": self.teacher.mixtures if self.teacher is not None else None,
            "projections": self.projections,
            "student_decoder": self.student_decoder,
            "teacher_decoder": self.teacher_decoder,
        }
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

    def forward(self, tiles: Tensor, visible: Tensor | None = None) -> Losses:
        """The losses of RGB tiles ``[N, 3, T, T]``, 0..255, of whose patches those in ``[N, V]`` are visible."""
        zero = self.mean.new_zeros(())
        with autocast(tiles.device, self.recipe.precision):
            ours = self.student_features(tiles, visible)
            theirs = self.teacher_features(tiles, visible) if self.teacher is not None else {}
            missed = self._missed(ours, theirs)
            pixels = [zero, zero]
            if visible is not None:
                values = patch_values(tiles, encoder_of(self.student).config.patch, self.recipe.pixels)
                for index, (decoder, seen) in enumerate(((self.teacher_decoder, theirs), (self.student_decoder, ours))):
                    if decoder is not None:
                        pixels[index] = reconstruction_loss(decoder(seen[max(seen)], visible), values, visible)
            classes, agreement = self._compare_classes(ours, theirs) if self.with_classes else (zero, zero)
        parts = torch.stack([missed.mean() if self.pairs else zero, *pixels, classes])
        return Losses(parts, missed.detach(), self._spread(theirs), agreement)

    def student_features(self, tiles: Tensor, visible: Tensor | None = None) -> dict[int, Tensor]:
        """The student's tokens ``[N, V, D]`` of patches, by block (0-based): all that the losses need."""
        encoder = encoder_of(self.student)
        return self._features(encoder, encoder, 1, self.student_decoder, tiles, visible)

    def teacher_features(
        self, tiles: Tensor, visible: Tensor | None = None, *, adapted: bool = True
    ) -> dict[int, Tensor]:
        """The same of the teacher; with its adapters, if it has any and ``adapted``."""
        assert self.teacher is not None
        encoder = self.teacher.encoder
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.teacher.mixtures is not None):
            network = self.teacher if adapted else encoder
            return self._features(network, encoder, 0, self.teacher_decoder, tiles, visible)

    def _features(
        self, network: Any, encoder: Any, side: int, decoder: nn.Module | None, tiles: Tensor, visible: Tensor | None
    ) -> dict[int, Tensor]:
        """See :meth:`student_features`; ``side`` is the place of the network in a pair."""
        wanted = {pair[side] - 1 for pair in self.pairs}
        if decoder is not None:
            wanted.add(len(encoder.blocks) - 1)
        if self.with_classes:
            wanted |= set(encoder.config.taps)
        first = encoder.config.extra_tokens
        found = network.run(kept(encoder.embed(tiles), visible, first), wanted, encoder.turn(visible))
        return {block: tokens[:, first:] for block, tokens in zip(sorted(wanted), found, strict=True)}

    def _missed(self, ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> Tensor:
        """The mean squared difference of each pair, ``[P]``."""
        missed = [self.mean.new_zeros(0)]
        for index, (guide, block) in enumerate(self.pairs):
            target = theirs[guide - 1].float()
            target = self._standardised(index, target.detach() if self.recipe.feedback == "student" else target)
            told = self.projections[index](ours[block - 1]).float()
            if isinstance(self.projections[index], nn.Identity):  # the features themselves have to agree
                told = self._standardised(index, told)
            missed.append((_as_many(told, target.shape[1]) - target).square().mean()[None])
        return torch.cat(missed)

    def _standardised(self, index: int, features: Tensor) -> Tensor:
        return features if self.recipe.target == "raw" else (features - self.mean[index]) / self.std[index]

    def _spread(self, theirs: dict[int, Tensor]) -> Tensor:
        """Per pair, the mean over the channels of the features' standard deviation over that without adapters."""
        spread = [theirs[guide - 1].detach().float().std(dim=(0, 1)) for guide, _ in self.pairs]
        return (torch.stack(spread) / self.std).mean(dim=1) if spread else self.mean.new_zeros(0)

    def _compare_classes(self, ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Divergence of the class probabilities, and the share of cells with the same label."""
        student, teacher = self.student, self._heads[0]
        assert isinstance(student, SegmentationNetwork)
        logits, truth = (
            network.head([_as_map(features[block]) for block in network.config.taps]).float()
            for network, features in ((student, ours), (teacher, theirs))
        )
        logits = _as_large(logits, truth.shape[-1])
        same = (logits.detach().argmax(1) == truth.argmax(1)).float().mean()
        return class_divergence(logits, truth), same

    @torch.no_grad()
    def measure_teacher(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Measure mean and standard deviation of the channels of the paired features, from tiles and their masks.

        The teacher is taken without adapters: convex ones start at random and change its features.
        """
        totals = torch.zeros(2, *self.mean.shape, dtype=torch.float64, device=self.mean.device)
        count = 0
        for tiles, visible in batches:
            with autocast(tiles.device, self.recipe.precision):
                features = self.teacher_features(tiles, visible, adapted=False)
            for index, (guide, _) in enumerate(self.pairs):
                values = features[guide - 1].double().flatten(0, 1)
                totals[:, index] += torch.stack([values.sum(0), values.square().sum(0)])
            count += len(values)
        mean, square = totals / count
        variance = square - mean**2
        least = (variance.mean(dim=1, keepdim=True) * _LEAST_VARIANCE).clamp_min(1e-12)
        self.mean.copy_(mean)
        self.std.copy_(variance.clamp_min(least).sqrt())


def class_divergence(logits: Tensor, truth: Tensor) -> Tensor:
    """Kullback-Leibler divergence of class probabilities ``[N, K, G, G]``, mean over the cells."""
    ours, theirs = logits.log_softmax(1), truth.log_softmax(1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1).mean()


def _as_map(tokens: Tensor) -> Tensor:
    """Tokens ``[N, L, D]`` of a square map as ``[N, D, G, G]``."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


def _as_many(tokens: Tensor, count: int) -> Tensor:
    """Tokens ``[N, L, D]`` of a square map resampled to ``count``, ``[N, count, D]``."""
    return _as_large(_as_map(tokens), math.isqrt(count)).flatten(2).transpose(1, 2)


def _as_large(maps: Tensor, side: int) -> Tensor:
    """Maps ``[N, C, G, G]`` resampled to another side, where the patches of student and teacher differ."""
    if maps.shape[-1] == side:
        return maps
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False, antialias=True)


def _pairs(recipe: DistillRecipe, teacher: Any, student: Encoder) -> tuple[tuple[int, int], ...]:
    """The pairs of the recipe, or those at the quarters of both networks. UsageError: there is no such block."""
    depths = len(teacher.blocks), student.config.depth
    for pair in recipe.pairs:
        for role, block, depth in zip(("teacher", "student"), pair, depths, strict=True):
            if block > depth:
                raise UsageError(f"--pairs names block {block} of the {role}, which has {depth}")
    return recipe.pairs or quarter_pairs(*depths, 4 if recipe.method == FEATURES else 3)


def _require_comparable(recipe: DistillRecipe, student: Encoder, teacher: Any | None) -> None:
    """Make sure that masks fit the student, and the teacher's features the student's."""
    config = student.config
    if recipe.masked:
        if config.attention:
            raise UsageError(
                "masks need global attention in the student",
                hint="distill first, then `cdkd-edge convert --attention`; or --method features",
            )
        if isinstance(teacher, Encoder) and teacher.config.attention:
            raise UsageError(
                "masks need global attention in the teacher, or SAM's windows",
                hint="--method features, or the network that the teacher was converted from",
            )
        if config.grid % recipe.cell:
            raise UsageError(
                f"cells of {recipe.cell} x {recipe.cell} patches do not fit a tile of {config.grid} x {config.grid}",
                hint=f"--cell with a divisor of {config.grid}, or another --tile",
            )
    if teacher is None:
        return
    if recipe.method == MASKED and teacher.config.grid != config.grid:
        raise CheckpointError(
            f"a tile has {teacher.config.grid} x {teacher.config.grid} patches for the teacher and {config.grid} x "
            f"{config.grid} for the student; masks need the same",
            hint="leave out --teacher-patch; or --method features, which resamples the student's features",
        )
    if recipe.projection == "none" and teacher.config.embed_dim != config.embed_dim:
        raise CheckpointError(
            f"the student's features are {config.embed_dim} wide, the teacher's {teacher.config.embed_dim}",
            hint="--projection linear compares them through a linear layer",
        )


def _have_heads(student: Network, teacher: Any) -> bool:
    """Whether both have heads. UsageError if these know other classes."""
    if not isinstance(student, SegmentationNetwork) or not isinstance(teacher, SegmentationNetwork):
        return False
    if student.config.classes != teacher.config.classes:
        raise UsageError(
            f"the student's head knows {student.config.classes} classes, the teacher's {teacher.config.classes}",
            hint="align features alone: --logits 0",
        )
    return True
