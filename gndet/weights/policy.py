"""What becomes of a part whose norm in the file is not the model's (`train.norm_policy`): nothing is guessed.

A part is one of ModelConfig.parts; `there` is the file's norm, `here` the model's.
"""

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from gndet.config.schema import Config, ModelConfig, NormConfig, TrainConfig
from gndet.errors import CheckpointError
from gndet.modeling.conv_norm import StandardizedConv2d
from gndet.modeling.norms.layers import make_norm
from gndet.weights.convert import Fate, convert_batch_norm
from gndet.weights.read import Source

CHOICES = {  # policies that are not `error`
    "hybrid": "the parts that are BN in the file stay so, frozen",
    "convert": "GN that computes nearly the same, in closed form from the file alone",
    "calibrate": "the same where the file has statistics, then gamma and beta fitted on training images",
    "affine": "gamma and beta copied by name, which destroys the features",
    "reinit": "the convolutions only, the norms anew",
}
AS_IN_FILE = "as in the file"
STATISTICS = ("weight", "bias", "running_mean", "running_var")


def mismatched(source: Source, model: ModelConfig) -> dict[str, tuple[NormConfig, NormConfig]]:
    """Return the parts of the file whose norm there and norm here compute different things from the same numbers.

    That includes weight standardization here of weights without it there; the reverse folds into the weights exactly.
    """
    theirs, ours = source.model.part_norms(), model.part_norms()
    used = [part for part in source.parts if part in source.model.normed_parts and part in model.normed_parts]
    pairs = {part: (theirs[part], ours[part]) for part in used}
    return {
        part: (there, here)
        for part, (there, here) in pairs.items()
        if _family(there) != _family(here) or (here.weight_standardization and not there.weight_standardization)
    }


def _family(norm: NormConfig) -> tuple[object, ...]:
    """Return what decides the meaning of gamma and beta: equal for norms that can load each other's weights."""
    if norm.has_running_statistics:
        return ("bn",)
    if norm.kind == "gn" and norm.channels_per_group is not None:
        return ("gn", "channels", norm.channels_per_group)
    groups = {"gn": norm.groups, "ln": 1}.get(norm.kind)
    return (("gn" if groups else norm.kind), groups)


def with_policy(source: Source, model: ModelConfig, train: TrainConfig) -> ModelConfig:
    """Return the model's config after `hybrid`, which changes parts of it; refuse a policy that cannot work.

    Raises CheckpointError where the norms differ and no policy is named, with the choices, and where the file lacks
    what the policy needs.
    """
    differing = mismatched(source, model)
    clashes = {
        part: f"its {part} has {_words(there)}, this model has {_words(here)}"
        for part, (there, here) in differing.items()
    }
    if differing and train.norm_policy == "error":
        keep = [f"model.{part}.norm={{kind: {_as_override(there)}}}" for part, (there, _) in differing.items()]
        live = any(there.mixes_images for there, _ in differing.values())
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
            update={"norm": NormConfig(kind="frozen_bn", eps=there.eps, padding=here.padding)}
        )
        for part, (there, here) in differing.items()
    }
    return model.model_copy(update=frozen)


def _as_override(norm: NormConfig) -> str:
    """Return what model.PART.norm must be for the part to stay as it is."""
    groups = "channels_per_group" if norm.channels_per_group else "groups"
    return norm.kind + (f", {groups}: {getattr(norm, groups)}" if norm.kind == "gn" else "")


def _words(norm: NormConfig) -> str:
    standardized = " with weight standardization" if norm.weight_standardization else ""
    return norm.kind + (f" ({norm.grouping})" if norm.kind == "gn" else "") + standardized


def _unable(policy: str, part: str, there: NormConfig, here: NormConfig, source: Source) -> str:
    """Say why a policy cannot bring a part from one norm to another; empty where it can."""
    is_batch, to_group = there.has_running_statistics, here.is_group_norm
    if policy == "hybrid" and not is_batch:
        return "it keeps BN frozen, and the file has none there"
    if policy in ("convert", "calibrate") and not to_group:
        return f"it makes GN (or ln, in) out of what the file has, not {here.kind}"
    if policy in ("convert", "calibrate") and here.weight_standardization and not there.weight_standardization:
        return "weight standardization changes the convolutions themselves"
    if policy == "convert" and not is_batch:
        return "the closed form needs BN's statistics; calibrate measures on images instead"
    if policy == "convert" and part in source.fused:
        return "the file's BN layers are affine maps whose statistics are gone; calibrate measures on images instead"
    if policy == "affine" and "none" in (there.kind, here.kind):
        return "there is no gamma and beta on both sides"
    return ""


def carry_norms(source: Source, model: nn.Module, cfg: Config) -> tuple[dict[str, Tensor], dict[str, Fate]]:
    """Turn the norm layers of a file into those of the model, by train.norm_policy where they differ.

    model: built from cfg.model.  Returns the source's state without the tensors that start anew, and what became of
    each norm layer.
    """
    state, fates = dict(source.state), {}
    differing, theirs, ours = mismatched(source, cfg.model), source.model.part_norms(), cfg.model.part_norms()
    for name, module in model.named_modules():
        part = name.partition(".")[0]
        if not name.endswith(".norm") or part not in source.parts:
            continue
        there, here, conv = theirs[part], ours[part], name.removesuffix("norm") + "conv"
        gamma, own = state.get(f"{name}.weight"), getattr(module, "weight", None)
        if f"{conv}.weight" not in state or (gamma is not None and own is not None and gamma.shape != own.shape):
            continue  # the loading says what is absent or of another shape, and the likely cause
        if there.weight_standardization and not here.weight_standardization:
            state[f"{conv}.weight"] = StandardizedConv2d.standardize(state[f"{conv}.weight"])  # exact
        if part in differing:
            fates[name] = _carry(name, state, source, there, module, cfg.train)
        elif there.kind != "none":
            _same_eps(name, state, there, here)
            if here.is_group_norm and there.eps != here.eps and f"{name}.eps" not in state:
                state[f"{name}.eps"] = torch.tensor(there.eps, dtype=torch.float64)
            fates[name] = Fate(AS_IN_FILE + (", frozen" if here.kind == "frozen_bn" else ""))
    return state, fates


def _carry(
    name: str, state: dict[str, Tensor], source: Source, there: NormConfig, module: Any, train: TrainConfig
) -> Fate:
    """Bring one norm layer over, in place of the file's tensors in state."""
    old: dict[str, Any] = {key: state.pop(f"{name}.{key}", None) for key in (*STATISTICS, "num_batches_tracked", "eps")}
    policy = train.norm_policy
    if policy == "reinit" or there.kind == "none":
        state.pop(name.removesuffix("norm") + "conv.bias", None)
        return Fate("anew")
    needed = STATISTICS if there.has_running_statistics else STATISTICS[:2]
    if missing := [key for key in needed if old[key] is None]:
        raise CheckpointError(f"{source.path}: {name}.{missing[0]}: absent from the file")
    if policy == "affine" or name.partition(".")[0] in source.fused or not there.has_running_statistics:
        state[f"{name}.weight"], state[f"{name}.bias"] = old["weight"], old["bias"]
        return Fate(f"gamma and beta of {there.kind}{' copied by name' if policy == 'affine' else ''}")
    try:
        new = convert_batch_norm(
            old["weight"], old["bias"], old["running_mean"], old["running_var"], bn_eps=there.eps,
            groups=module.groups, eps=module.config_eps, damp=train.norm_damp,
        )  # fmt: skip
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {name}: {error}") from None
    state[f"{name}.weight"], state[f"{name}.bias"] = new.gamma, new.beta
    if new.eps != module.config_eps:
        state[f"{name}.eps"] = torch.tensor(new.eps, dtype=torch.float64)
    return Fate(f"converted from {there.kind}, damp {train.norm_damp:g}", new.expected_error)


def _same_eps(name: str, state: dict[str, Tensor], there: NormConfig, here: NormConfig) -> None:
    """Make BN with the eps here compute what it computed with the eps there: exactly, in its variance or its gamma."""
    if not there.has_running_statistics or there.eps == here.eps or f"{name}.running_var" not in state:
        return
    var = state[f"{name}.running_var"].double()
    if float(var.min()) + there.eps >= here.eps:
        state[f"{name}.running_var"] = (var + there.eps - here.eps).float()
    else:
        ratio = ((var + here.eps) / (var + there.eps)).sqrt()
        state[f"{name}.weight"] = (state[f"{name}.weight"].double() * ratio).float()


def reference_norms(source: Source, model: nn.Module, config: ModelConfig) -> dict[str, nn.Module]:
    """Return the file's own norm for each layer of the model that has another norm now, to compare a conversion with.

    They are masked as the model's norms are, so that padding does not enter the comparison.
    """
    references: dict[str, nn.Module] = {}
    differing, state = mismatched(source, config), source.state
    for name, module in model.named_modules():
        part = name.partition(".")[0]
        if part not in differing or not name.endswith(".norm"):
            continue
        there, here = differing[part]
        tensors = {key: state[f"{name}.{key}"] for key in (*STATISTICS, "eps") if f"{name}.{key}" in state}
        norm = there.model_copy(update={"padding": "masked" if here.masked else "plain"})
        if there.kind == "none":  # the convolution's bias alone
            norm = norm.model_copy(update={"kind": "frozen_bn", "eps": 0.0})
            tensors = {"bias": state[name.removesuffix("norm") + "conv.bias"]}
        elif there.has_running_statistics:
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
