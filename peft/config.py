"""From yaml names to plain arguments: composing, instantiating, and errors that say what to do.

The only module of the package that knows Hydra. The entry points (`train.py`, `eval.py`,
`sweep.py`) and `peft.create` go through it.
"""

import contextlib
import difflib
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
PROGRAMS = ("train", "eval", "sweep")
# what Hydra's grammar complains of, and what was probably meant
QUOTED = "a value with spaces, accents, = or brackets takes quotes of its own: \"key='a value'\""
HINTS = {
    "Ambiguous value for argument": "several values are several runs: add -m",
    "Error parsing override": "an option is key=value, such as method=lora",
    "no viable alternative at input": "is that argument whole, and quoted for the shell?",
    "LexerNoViableAltException": QUOTED,
    "mismatched input": QUOTED,
}
# what a backbone's yaml tells build_backbone
BUILDING = ("patch", "smallest", "accepts", "fixed", "head", "unused", "fresh", "original")
_composing = threading.Lock()


def catalogue(group: str) -> list[str]:
    """The names of a configuration group: a folder listing, `mini/digits` for nested ones.
    `_name.yaml` is a shared part, not an entry."""
    folder = CONFIGS / group
    return sorted(
        f.relative_to(folder).with_suffix("").as_posix()
        for f in folder.rglob("*.yaml")
        if not f.name.startswith("_")
    )


@contextlib.contextmanager
def _hydra_here() -> Iterator[None]:
    """Our configuration folder as Hydra's, also inside a program that runs under Hydra itself."""
    with _composing:
        running = GlobalHydra.instance().hydra
        GlobalHydra.instance().hydra = None
        try:
            with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
                yield
        finally:
            GlobalHydra.instance().hydra = running


def compose(config_name: str = "train", overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of one run. Raises ValueError naming what is near an unknown name or
    key."""
    with _hydra_here():
        try:
            return hydra.compose(config_name, list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error, config_name)) from error


def near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return (
        f"did you mean {' or '.join(close)}? There is: {', '.join(known)}"
        if close
        else f"there is: {', '.join(known)}"
    )


def taken(config_name: str) -> list[str]:
    """The keys and groups that a program takes on its command line."""
    node = OmegaConf.load(CONFIGS / f"{config_name}.yaml")
    parts = [key for part in node.pop("defaults") if isinstance(part, DictConfig) for key in part]
    groups = {part for part in parts if not part.startswith("override ")}
    return sorted(groups | node.keys() - {"hydra"})


def unknown(name: str, config_name: str) -> str:
    """What to say of a key or group that a program does not take, nor, of a sweep, its runs."""
    others = [f"{other}.py" for other in PROGRAMS if name in taken(other)]
    if others:
        known = ", ".join(taken(config_name))
        return f"{name!r} is for {' and '.join(others)}, {config_name}.py takes: {known}"
    if (CONFIGS / name).is_dir():
        return (
            f"configs/{name} is not chosen on a command line: sweeps and experiments name its "
            "entries, see python sweep.py experiment=rlrr/table2 action=plan"
        )
    known = taken(config_name) + (taken("train") if config_name == "sweep" else [])
    return f"there is no key or group {name!r}; {near(name, sorted(set(known)))}"


def explain(error: Exception, config_name: str) -> str:
    """Hydra's and OmegaConf's errors in one paragraph, with near names."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.removesuffix(".yaml").partition("/")
        if name and (CONFIGS / group).is_dir():
            return f"there is no {group} {name!r}; {near(name, catalogue(group))}"
    full_key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    parent = getattr(error, "parent_node", None)
    if parent is None:
        parent = getattr(error.__cause__, "parent_node", None)
    if full_key and isinstance(parent, DictConfig):
        above, _, leaf = full_key.rpartition(".")
        if not above:
            return unknown(leaf, config_name)
        return f"there is no key {full_key!r}; {near(leaf, sorted(map(str, parent)))}"
    if isinstance(error, InstantiationException) and error.__cause__:
        text = str(error).partition(", set env var")[0].partition("\n")[0]
        said = " ".join(str(error.__cause__).split()).removesuffix(", set env var")
        return f"{text}: {said}{place(error.__cause__)}"
    text = " ".join(str(part).split("\n")[0] for part in (error, error.__cause__) if part)
    group = re.search(r"Could not override '([\w/]+)'", text)
    if group:
        return unknown(group[1], config_name)
    if empty := re.search(r"Could not find '(\w+)/'", text):  # method=
        return f"{empty[1]} has no value; there is: {', '.join(catalogue(empty[1]))}"
    return "; ".join([text, *(hint for said, hint in HINTS.items() if said in text)])


# What is told in one paragraph; timm asserts what others raise.
TOLD = (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, AssertionError)


def entry(config_name: str) -> Callable:
    """Hydra's decorator with our errors: one paragraph on stderr, exit status 1 (130 for Ctrl-C).
    PEFT_TRACEBACK=1 shows where from."""

    def decorate(main: Callable[[DictConfig], object]) -> Callable[[], None]:
        def job(cfg: DictConfig) -> object:
            try:
                return main(cfg)
            except KeyboardInterrupt:
                _stop("interrupted: the same command goes on from the last checkpoint", 130)
            except (*TOLD, HydraException) as error:
                if HydraConfig.get().mode is RunMode.MULTIRUN:
                    raise  # Hydra goes on with the other jobs and raises this at the end
                if isinstance(error, HydraException):
                    _stop(explain(error, config_name), 1)
                _stop(f"{error}{place(error)}", 1)

        run = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)

        @wraps(main)
        def command() -> None:
            os.environ.setdefault(
                "HYDRA_FULL_ERROR", "1"
            )  # Hydra raises, instead of printing and exiting in its own words
            try:
                run()
            except KeyboardInterrupt:
                _stop("interrupted", 130)
            except (HydraException, OmegaConfBaseException) as error:
                _stop(explain(error, config_name), 1)
            except TOLD as error:
                _stop(f"{error}{place(error)}", 1)

        return command

    return decorate


def place(error: BaseException) -> str:
    """Where an error that nobody meant came from: the last line of ours; nothing for one that was
    raised on purpose, which says what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = (f for f in frames if Path(f.filename).is_relative_to(ROOT))
    ours = [frame for frame in inside if "site-packages" not in frame.filename]
    if not ours or (ours[-1] is frames[-1] and str(ours[-1].line).startswith("raise")):
        return ""
    last = ours[-1]
    return (
        f" (at {Path(last.filename).relative_to(ROOT)}:{last.lineno}, `{last.line}`; "
        "PEFT_TRACEBACK=1 shows the whole way)"
    )


def _stop(message: str, status: int) -> None:
    if os.environ.get("PEFT_TRACEBACK"):
        traceback.print_exc()
    print(f"error: {message}" if status == 1 else f"\n{message}", file=sys.stderr)
    sys.exit(status)


def plain(node: object) -> object:
    """A node of the configuration as plain Python, resolved."""
    return (
        OmegaConf.to_container(node, resolve=True)
        if isinstance(node, (DictConfig, ListConfig))
        else node
    )


def check_applies(method: DictConfig, family: str) -> list | ListConfig:
    """The placements of a method on a family of backbones, as its yaml has them. Raises ValueError
    with the yaml's reason where the method does not apply."""
    reason = (method.get("excludes") or {}).get(family)
    placements = method.placements
    if isinstance(placements, DictConfig):
        placements = placements.get(family)
        reason = reason or (
            f"its yaml places tuners on {', '.join(method.placements)} only"
            if placements is None
            else None
        )
    if reason:
        raise ValueError(f"method {method.name} does not apply to {family} backbones: {reason}")
    return placements


def placements_of(method: DictConfig, family: str) -> list:
    """The placements of a method on a family of backbones, instantiated, without those whose `when`
    is false. Raises ValueError where the method does not apply, or nothing of it is left."""
    placements = instantiate(check_applies(method, family), _convert_="all")
    kept = [placement for placement in placements if placement.pop("when", True)]
    if placements and not kept:
        raise ValueError(
            f"every placement of method {method.name} is switched off: that is method=linear"
        )
    return kept


def build(backbone: DictConfig, method: DictConfig, **options) -> "nn.Module":
    """The model of a backbone node and a method node, tuners attached; see `build_bare`."""
    from peft.core import attach  # here: listing configurations needs no torch

    placements = placements_of(method, backbone.family)
    return attach(build_bare(backbone, **options), placements, plain(method.trainable))


def build_bare(
    backbone: DictConfig,
    *,
    num_classes: int,
    pretrained: bool | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    **kwargs,
) -> "nn.Module":
    """The network of a backbone node as it stands. Raises FileNotFoundError where the weights of a
    hub cannot be had."""
    from peft.backbone import build_backbone

    if pretrained is None:
        pretrained = backbone.get("pretrained", True) or weights is not None
    source = weights
    if pretrained and source is None and backbone.weights is not None:
        source = (
            instantiate(backbone.weights)
            if isinstance(backbone.weights, DictConfig)
            else backbone.weights
        )
    try:
        return build_backbone(
            instantiate(backbone.model, _convert_="all"),
            {site: pattern for site, pattern in plain(backbone.sites).items() if pattern},
            num_classes=num_classes,
            pretrained=pretrained,
            weights=source,
            image_size=image_size or backbone.image_size,
            **{key: plain(backbone[key]) for key in BUILDING if key in backbone},
            **kwargs,
        )
    except OSError as error:
        if not pretrained or source is not None:
            raise
        original = f", the original of {backbone.original}" if backbone.get("original") else ""
        said = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        raise FileNotFoundError(
            f"{backbone.name}: its weights are neither in the hub's cache nor to be had "
            f"({said}); give weights=FILE{original}"
        ) from error


def create(
    backbone: str,
    method: str = "linear",
    *,
    num_classes: int = 1000,
    pretrained: bool = False,
    **overrides,
) -> "nn.Module":
    """A model by the names of its yamls, e.g. `create("vit_b16_in21k", "lora", num_classes=100,
    rank=4)`.

    An override is a key of the method's or the backbone's yaml, or a dotted path such as
    `**{"method.rank": 4}`; `weights=FILE` and `image_size=...` as on the command line, `drop_path`
    and `layer_dropout` as in an optimiser's yaml. Raises ValueError for an unknown name or key,
    naming near ones.
    """
    weights, image_size = overrides.pop("weights", None), overrides.pop("image_size", None)
    rates = {key: overrides.pop(key) for key in ("drop_path", "layer_dropout") if key in overrides}
    cfg = compose("train", [f"backbone={backbone}", f"method={method}"])
    for key, value in overrides.items():
        path = (
            key
            if "." in key
            else next(
                (f"{group}.{key}" for group in ("method", "backbone") if key in cfg[group]), key
            )
        )
        if OmegaConf.select(cfg, path, default=KeyError) is KeyError:
            raise ValueError(f"there is no key {key!r}; {near(key, [*cfg.method, *cfg.backbone])}")
        OmegaConf.update(cfg, path, value, merge=False)
    return build(
        cfg.backbone,
        cfg.method,
        num_classes=num_classes,
        pretrained=pretrained or weights is not None,
        weights=weights,
        image_size=image_size,
        **rates,
    )
