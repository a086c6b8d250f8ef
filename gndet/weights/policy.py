"""Handle parts whose norm in the file differs from the model's (`train.norm_policy`), without guessing.

A part is one of ModelConfig.parts.
"""

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.schema import Config
from gndet.config.training import TrainConfig
from gndet.errors import CheckpointError
from gndet.modeling.conv_norm import StandardizedConv2d
from gndet.modeling.norms.layers import make_norm
from gndet.weights.convert import Fate, convert_batch_norm
from gndet.weights.read import Source

CHOICES = {  # policies that are not `error`
    "hybrid": "the parts that have BN in the file keep it, frozen",
    "convert": "GN that computes nearly the same, in closed form from the file alone",
    "calibrate": "as convert if the file has statistics, then gamma and beta fitted on training images",
    "affine": "gamma and beta copied by name, which destroys the features",
    "reinit": "the convolutions only; the norms are newly initialized",
}
AS_IN_FILE = "as in the file"
STATISTICS = ("weight", "bias", "running_mean", "running_var")


def mismatched(source: Source, model: ModelConfig) -> dict[str, tuple[NormConfig, NormConfig]]:
    """Return the file's and the model's norm of each part in which the same tensors mean different things to the two.

    That includes weight standardization in the model for weights trained without it; the reverse folds into the weights
    exactly.
    """
    file_norms, model_norms = source.model.part_norms(), model.part_norms()
    used = [part for part in source.parts if part in source.model.normed_parts and part in model.normed_parts]
    if model.backbone.kind == "timm":
        from gndet.modeling.timm_backbone import norm_of

        used = [part for part in used if part != "backbone" or norm_of(model.backbone.name)]  # LayerNorms stay
    pairs = {part: (file_norms[part], model_norms[part]) for part in used}
    return {
        part: (file_norm, model_norm)
        for part, (file_norm, model_norm) in pairs.items()
        if _family(file_norm) != _family(model_norm)
        or (model_norm.weight_standardization and not file_norm.weight_standardization)
    }


def _family(norm: NormConfig) -> tuple[object, ...]:
    """Return what decides the meaning of gamma and beta: equal for norms that can load each other's weights."""
    if norm.has_running_statistics:
        return ("bn",)
    kind, eps = (norm.kind, norm.eps) if norm.replaces_relu else ("gn", None)  # GN keeps the eps of a file
    if norm.has_groups and norm.channels_per_group is not None:
        return (kind, eps, "channels", norm.channels_per_group)
    groups = norm.groups if norm.has_groups else {"ln": 1}.get(norm.kind)
    return (kind, eps, groups) if groups else (norm.kind, eps)


def with_policy(source: Source, model: ModelConfig, train: TrainConfig) -> ModelConfig:
    """Return the model's config, in which `hybrid` changes the norms of parts; refuse a policy that cannot work.

    Raises CheckpointError, with the choices, if norms differ and no policy is set, or if the file lacks what the policy
    needs.
    """
    differing = mismatched(source, model)
    clashes = {
        part: f"its {part} has {_words(file_norm)}, this model has {_words(model_norm)}"
        for part, (file_norm, model_norm) in differing.items()
    }
    if differing and train.norm_policy == "error":
        keep = [f"model.{part}.norm={{kind: {_as_override(file_norm)}}}" for part, (file_norm, _) in differing.items()]
        live = any(file_norm.mixes_images for file_norm, _ in differing.values())
        hint = "; frozen_bn keeps its statistics" if live else ""
        able = [
            f"  train.norm_policy={policy:<10}  {words}" for policy, words in CHOICES.items()
            if not any(_unable(policy, part, *pair, source) for part, pair in differing.items())
        ]  # fmt: skip
        choices = "\n".join([f"  {' '.join(keep)}  as in the file{hint}", *able])
        raise CheckpointError(
            f"{source.path}: {'; '.join(clashes.values())}; "
            f"the same numbers mean something else there, so choose one of\n{choices}"
        )
    for part, pair in differing.items():
        if why := _unable(train.norm_policy, part, *pair, source):
            rest = f"model.{part}.norm={{kind: {_as_override(pair[0])}}} keeps the part as it is"
            raise CheckpointError(
                f"{source.path}: {clashes[part]}; train.norm_policy: {train.norm_policy} is impossible: {why}; {rest}"
            )
    if train.norm_policy != "hybrid":
        return model
    frozen = {
        part: getattr(model, part).model_copy(
            update={"norm": NormConfig(kind="frozen_bn", eps=file_norm.eps, padding=model_norm.padding)}
        )
        for part, (file_norm, model_norm) in differing.items()
    }
    return model.model_copy(update=frozen)


def _as_override(norm: NormConfig) -> str:
    """Return the value of model.PART.norm that keeps the part as it is."""
    groups = "channels_per_group" if norm.channels_per_group else "groups"
    eps = f", eps: {norm.eps}" if norm.replaces_relu else ""  # it is part of what these norms compute
    return norm.kind + (f", {groups}: {getattr(norm, groups)}" if norm.has_groups else "") + eps


def _words(norm: NormConfig) -> str:
    standardized = " with weight standardization" if norm.weight_standardization else ""
    eps = f" with eps {norm.eps:g}" if norm.replaces_relu else ""
    return norm.kind + (f" ({norm.grouping})" if norm.has_groups else "") + eps + standardized


def _unable(policy: str, part: str, file_norm: NormConfig, model_norm: NormConfig, source: Source) -> str:
    """Return why a policy cannot take a part from the file's norm to the model's; empty if it can."""
    is_batch, to_group = file_norm.has_running_statistics, model_norm.is_group_norm
    if policy == "hybrid" and not is_batch:
        return "it keeps BN frozen, but the file has no BN in this part"
    if policy in ("convert", "calibrate") and not to_group:
        return f"it can turn the file's norm into gn, ln or in, not into {model_norm.kind}"
    if policy in ("convert", "calibrate") and file_norm.replaces_relu:
        return "the file's activations are not ReLU"
    newly_standardized = model_norm.weight_standardization and not file_norm.weight_standardization
    if policy in ("convert", "calibrate") and newly_standardized:
        return "weight standardization changes the convolutions themselves"
    if policy == "convert" and not is_batch:
        return "the closed form needs BN's statistics; calibrate measures on images instead"
    if policy == "convert" and part in source.fused:
        return "the file's BN layers are affine maps whose statistics are gone; calibrate measures on images instead"
    if policy == "affine" and "none" in (file_norm.kind, model_norm.kind):
        return "one of the two norms has no gamma and beta"
    return ""


def carry_norms(source: Source, model: nn.Module, cfg: Config) -> tuple[dict[str, Tensor], dict[str, Fate]]:
    """Turn the norm layers of a file into those of the model, by train.norm_policy if they differ.

    model: built from cfg.model.  Returns the source's state without the tensors to initialize, and what became of
    each norm layer.
    """
    state, fates = dict(source.state), {}
    differing = mismatched(source, cfg.model)
    file_norms, model_norms = source.model.part_norms(), cfg.model.part_norms()
    for name, module in model.named_modules():
        part = name.partition(".")[0]
        if not name.endswith(".norm") or part not in source.parts or isinstance(module, nn.LayerNorm):
            continue
        file_norm, model_norm, conv = file_norms[part], model_norms[part], name.removesuffix("norm") + "conv"
        gamma, model_gamma = state.get(f"{name}.weight"), getattr(module, "weight", None)
        misfit = gamma is not None and model_gamma is not None and gamma.shape != model_gamma.shape
        if (f"{conv}.weight" not in state and gamma is None) or misfit:
            continue  # load_weights will report what is missing or has another shape, and the likely cause
        if gamma is None and file_norm.kind != "none":
            continue  # this layer of the file has no norm (box_head.norm_last: false)
        if file_norm.weight_standardization and not model_norm.weight_standardization:
            state[f"{conv}.weight"] = StandardizedConv2d.standardize(  # exact
                state[f"{conv}.weight"], file_norm.standardization
            )
        if part in differing:
            fates[name] = _carry(name, state, source, file_norm, module, cfg.train)
        elif file_norm.kind != "none":
            _same_eps(name, state, file_norm, model_norm)
            if model_norm.is_group_norm and file_norm.eps != model_norm.eps and f"{name}.eps" not in state:
                state[f"{name}.eps"] = torch.tensor(file_norm.eps, dtype=torch.float64)
            fates[name] = Fate(AS_IN_FILE + (", frozen" if model_norm.kind == "frozen_bn" else ""))
    return state, fates


def _carry(
    name: str, state: dict[str, Tensor], source: Source, file_norm: NormConfig, module: Any, train: TrainConfig
) -> Fate:
    """Convert one norm layer: replace the file's tensors in state, and return what became of it."""
    old: dict[str, Any] = {key: state.pop(f"{name}.{key}", None) for key in (*STATISTICS, "num_batches_tracked", "eps")}
    for key in own_parameters(name):
        state.pop(key, None)
    policy = train.norm_policy
    if policy == "reinit" or file_norm.kind == "none":
        state.pop(name.removesuffix("norm") + "conv.bias", None)
        return Fate("anew")
    needed = STATISTICS if file_norm.has_running_statistics else STATISTICS[:2]
    if missing := [key for key in needed if old[key] is None]:
        raise CheckpointError(f"{source.path}: {name}.{missing[0]}: absent from the file")
    if policy == "affine" or name.partition(".")[0] in source.fused or not file_norm.has_running_statistics:
        state[f"{name}.weight"], state[f"{name}.bias"] = old["weight"], old["bias"]
        return Fate(f"gamma and beta of {file_norm.kind}{' copied by name' if policy == 'affine' else ''}")
    try:
        new = convert_batch_norm(
            old["weight"], old["bias"], old["running_mean"], old["running_var"], bn_eps=file_norm.eps,
            groups=module.groups, eps=module.config_eps, damp=train.norm_damp,
        )  # fmt: skip
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {name}: {error}") from None
    state[f"{name}.weight"], state[f"{name}.bias"] = new.gamma, new.beta
    if new.eps != module.config_eps:
        state[f"{name}.eps"] = torch.tensor(new.eps, dtype=torch.float64)
    return Fate(f"converted from {file_norm.kind}, damp {train.norm_damp:g}", new.expected_error)


def own_parameters(norm: str) -> tuple[str, str]:
    """Return the names of the parameters that only EvoNorm-S0 and only FRN have, for the norm layer of that name."""
    return f"{norm}.v", f"{norm.removesuffix('norm')}tlu.tau"


def _same_eps(name: str, state: dict[str, Tensor], file_norm: NormConfig, model_norm: NormConfig) -> None:
    """Adapt the variance or gamma of a BN to the model's eps, so that it computes exactly what it did in the file."""
    if not file_norm.has_running_statistics or file_norm.eps == model_norm.eps or f"{name}.running_var" not in state:
        return
    var = state[f"{name}.running_var"].double()
    if float(var.min()) + file_norm.eps >= model_norm.eps:
        state[f"{name}.running_var"] = (var + file_norm.eps - model_norm.eps).float()
    else:
        ratio = ((var + model_norm.eps) / (var + file_norm.eps)).sqrt()
        state[f"{name}.weight"] = (state[f"{name}.weight"].double() * ratio).float()


def reference_norms(source: Source, model: nn.Module, config: ModelConfig) -> dict[str, nn.Module]:
    """Return the file's own norm for each layer whose norm was replaced, to compare the conversion with.

    They are masked if the model's norms are, so that padding does not enter the comparison.
    """
    references: dict[str, nn.Module] = {}
    differing, state = mismatched(source, config), source.state
    for name, module in model.named_modules():
        part = name.partition(".")[0]
        if part not in differing or not name.endswith(".norm") or isinstance(module, nn.LayerNorm):
            continue
        file_norm, model_norm = differing[part]
        if file_norm.replaces_relu or model_norm.replaces_relu:
            continue  # what follows the norms differs, too
        if file_norm.kind != "none" and f"{name}.weight" not in state:
            continue  # this layer of the file has no norm
        tensors = {key: state[f"{name}.{key}"] for key in (*STATISTICS, "eps") if f"{name}.{key}" in state}
        norm = file_norm.model_copy(update={"padding": "masked" if model_norm.masked else "plain"})
        if file_norm.kind == "none":  # only the convolution's bias
            norm = norm.model_copy(update={"kind": "frozen_bn", "eps": 0.0})
            tensors = {"bias": state[name.removesuffix("norm") + "conv.bias"]}
        elif file_norm.has_running_statistics:
            norm = norm.model_copy(update={"kind": "frozen_bn"})
        reference = make_norm(norm, len(module.weight))
        reference.load_state_dict(reference.state_dict() | tensors)
        references[name] = reference
    return references


def fate_lines(fates: dict[str, Fate]) -> list[str]:
    """Report the norms: one line per part and fate, with the range of the errors."""
    groups: dict[tuple[str, str], list[Fate]] = {}
    for name, fate in fates.items():
        groups.setdefault((name.partition(".")[0], fate.what), []).append(fate)
    lines = []
    for (part, what), members in groups.items():
        line = f"{part}: {len(members)} norm layer{'s' if len(members) > 1 else ''} {what}"
        for word in ("expected", "measured"):
            errors = [getattr(fate, f"{word}_error") for fate in members]
            errors = [error for error in errors if error is not None]
            if len(errors) == 1:
                line += f"; {word} error {errors[0]:.2f}"
            elif errors:
                line += f"; {word} error {min(errors):.2f} to {max(errors):.2f}, median {statistics.median(errors):.2f}"
        lines.append(line)
    return lines
