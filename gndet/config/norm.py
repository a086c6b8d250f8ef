"""The options of a normalization layer: `model.norm`, and `norm` of each part."""

from typing import Literal

from pydantic import Field, model_validator

from gndet.config.section import Section


class NormConfig(Section):
    """A normalization layer (Wu & He, "Group Normalization", ECCV 2018)."""

    # gn, ln, in: statistics per image; bn, sync_bn, brn: per batch; frozen_bn: fixed; frn, evonorm_s0: per image, with
    # an activation of their own. Source: Wu & He 2018
    kind: Literal["gn", "bn", "sync_bn", "frozen_bn", "ln", "in", "brn", "frn", "evonorm_s0", "none"] = "gn"
    groups: int = Field(32, ge=1)  # number of channel groups of gn and evonorm_s0. Source: Wu & He 2018, table 3
    # size of a channel group [channels]; replaces `groups` when set. Source: Wu & He 2018, table 3
    channels_per_group: int | None = Field(None, ge=1)
    eps: float = Field(1e-5, ge=0)  # added to the variance. Source: torch, Detectron
    # weight of a batch in the running statistics of bn, sync_bn and brn. Source: torch
    momentum: float = Field(0.1, gt=0, le=1)
    # masked: exclude the padding around a picture from statistics and outputs; plain: include it, as other toolkits
    # do; auto: masked, except for kinds that mix images
    padding: Literal["auto", "masked", "plain"] = "auto"
    # standardize the weights of the convolutions before the norm. Source: Qiao et al. 2019
    weight_standardization: bool = False
    # how: bit divides by sqrt(variance + 1e-10), qiao by the unbiased deviation + 1e-5 (mmdetection's weights).
    # Source: Kolesnikov et al. 2020
    standardization: Literal["bit", "qiao"] = "bit"

    @property
    def grouping(self) -> str:
        """Return in words how GN divides its channels."""
        return f"{self.channels_per_group} channels per group" if self.channels_per_group else f"{self.groups} groups"

    @property
    def masked(self) -> bool:
        """Whether statistics and outputs exclude the padding around a picture."""
        if self.padding == "auto":
            return not self.mixes_images
        return self.padding == "masked"

    @property
    def mixes_images(self) -> bool:
        """Whether the statistics span all images, or regions, that are computed at once."""
        return self.kind in ("bn", "sync_bn", "brn")

    @property
    def activates(self) -> bool:
        """Whether the layer is its own activation, so that no ReLU follows it."""
        return self.kind == "evonorm_s0"

    @property
    def learns_threshold(self) -> bool:
        """Whether a TLU, max(x, tau) with a learned tau, follows the layer instead of ReLU."""
        return self.kind == "frn"

    @property
    def replaces_relu(self) -> bool:
        """Whether the activations are not ReLU, so that they may be negative."""
        return self.activates or self.learns_threshold

    @property
    def has_groups(self) -> bool:
        """Whether `groups` and `channels_per_group` have an effect."""
        return self.kind in ("gn", "evonorm_s0")

    @property
    def has_running_statistics(self) -> bool:
        """Whether the layer has a running mean and variance."""
        return self.mixes_images or self.kind == "frozen_bn"

    @property
    def trains_with_running_statistics(self) -> bool:
        """Whether the training forward uses the running statistics, so that all ranks need the same ones."""
        return self.kind == "brn"

    @property
    def communicates_in_forward(self) -> bool:
        """Whether ranks exchange statistics in the forward and backward passes."""
        return self.kind == "sync_bn"

    @property
    def is_group_norm(self) -> bool:
        """Whether the statistics span groups of channels of one image: GN and its extremes LN and IN."""
        return self.kind in ("gn", "ln", "in")

    @model_validator(mode="after")
    def _batch_statistics_are_plain(self) -> "NormConfig":
        if self.padding == "masked" and self.mixes_images:
            raise ValueError(f"padding: masked is not available for kind: {self.kind}, whose statistics mix images")
        return self
