"""How a run begins in its folder, or goes on there."""

from support.commands import UserError
from support.files import check_output
from support.settings import Settings, check_names, plain

import dataclasses

from record.checkpoint import load_checkpoint
from record.log import LOG

COMPILE_FROM = 10_000  # steps: a shorter run ends before compilation has paid for itself
AUTOMATIC = ("precision", "image_size", "channels", "factor", "patch_size", "num_classes", "classes", "latent_shape",
             "latent_mean", "latent_std", "vae_hash", "clamp")  # settings whose default is resolved at the start


def open_run(run_dir):
    """Makes a folder ready for a new run. Raises `UserError` if it holds the checkpoint of a run, or another program's
    file that the run would replace. The pictures of a run whose checkpoint is gone are removed: a page shows one run's.
    """
    path = run_dir / "model.pth"
    grids = sorted(file for file in run_dir.glob("samples_*.png") if file.stem.removeprefix("samples_").isdecimal())
    if path.exists():
        raise UserError(f"{path} exists: go on with it (--resume), choose another folder, or remove it")
    check_output(run_dir / "log.csv", LOG)
    for file in (run_dir / "loss.png", run_dir / "index.html", *grids):
        check_output(file)
    if grids:
        print(f"{len(grids)} sample grids of an earlier run, whose checkpoint is gone, are removed from {run_dir}")
    for file in (*grids, run_dir / "loss.png"):
        file.unlink(missing_ok=True)


def load_to_resume(path, settings, of, changeable=None):
    """The configuration of the run saved at `path`, of the class `of`, changed as `settings` (a dict) say, and its
    checkpoint. changeable: the names of the settings that may change, if not those of the class. Raises `UserError`
    when others differ; the default of those that are `AUTOMATIC`, 0 or nothing is no difference."""
    saved = load_checkpoint(path, (of,))
    if "optimizers" not in saved:
        raise UserError(f"{path} holds weights to draw with, without what training on needs: train a new run")
    config = saved["config"]
    changeable = changeable or config.CHANGEABLE
    differences = [f"{name} {getattr(config, name)} -> {value}" for name, value in settings.items()
                   if name not in changeable and plain(of.__dataclass_fields__[name], value) != getattr(config, name)
                   and not (name in AUTOMATIC and value in (of.__dataclass_fields__[name].default, 0, (), ""))]
    if differences:
        raise UserError(f"{path} cannot be resumed with other settings: {', '.join(differences)}")
    config = dataclasses.replace(config, **{name: settings[name] for name in changeable if name in settings})
    if saved["step"] > config.steps:
        raise UserError(f"{path} is trained for {saved['step']:,} steps already: ask for more with --steps")
    return config, saved


def configure(settings, path, resume, of):
    """The configuration that `settings`, a `Settings` or a dict, ask for and, to resume, the checkpoint to go on from
    (else None). of: the class of settings of a dict."""
    if isinstance(settings, Settings):
        of, settings = type(settings), dataclasses.asdict(settings)
    check_names(settings, of.__dataclass_fields__)
    if resume:
        config, saved = load_to_resume(path, settings, of)
    else:
        config, saved = of(**{"compile": settings.get("steps", of.steps) >= COMPILE_FROM} | settings), None
    config.check_given(settings)
    return config, saved
