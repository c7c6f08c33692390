"""Start-up hook: lets LLaMA-Factory understand `finetuning_type: crosslore` and `CROSSLORE_MEASURE=FILE`.

Python imports this module at start-up (see `crosslore_llamafactory.pth`). It registers a finder that looks at module
names only; nothing else happens until LLaMA-Factory is imported. `CROSSLORE_LLAMAFACTORY=0` turns it off.
Keep it this small: every interpreter start pays for it.
"""

import sys

# The modules of LLaMA-Factory that are changed right after they ran; see crosslore.integrations.llamafactory.hooks.
SEAMS = (
    "llamafactory.launcher",
    "llamafactory.hparams.parser",
    "llamafactory.model.adapter",
    "llamafactory.train.trainer_utils",
    "llamafactory.train.tuner",
    "llamafactory.webui.components.top",
    "llamafactory.webui.components.train",
    "llamafactory.webui.locales",
    "llamafactory.webui.runner",
    "llamafactory.v1.plugins.trainer_plugins.optimizer",
    "llamafactory.v1.plugins.trainer_plugins.optimizers.optimizer",
)


class SeamFinder:
    """Finds the seams as usual, and calls our hook once such a module has run."""

    def find_spec(self, name, path=None, target=None):
        """Return the usual spec with a loader that calls the hook, or None for every other module."""
        if name not in SEAMS:
            return None
        import os

        if os.environ.get("CROSSLORE_LLAMAFACTORY") == "0":
            return None
        finders = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((s for s in (f.find_spec(name, path, target) for f in finders) if s is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            run = spec.loader.exec_module
            # A loader may serve several modules (zipimport): only seams are passed on.
            spec.loader.exec_module = lambda module: (run(module), module.__name__ in SEAMS and after_import(module))
        return spec


def after_import(module):
    """Change the module that just ran; a failure is reported and leaves LLaMA-Factory as it is."""
    try:
        from crosslore.integrations.llamafactory.hooks import patch

        patch(module)
    except Exception as error:  # LLaMA-Factory must go on working for its own types
        print(
            f"crosslore: could not prepare {module.__name__} ({type(error).__name__}: {error}). "
            "`finetuning_type: crosslore` is not available; other types are not affected. "
            "Reinstall crosslore, or set CROSSLORE_LLAMAFACTORY=0 to silence this.",
            file=sys.stderr,
        )


def register():
    """Put the finder first; calling it again changes nothing."""
    if not any(type(finder).__name__ == "SeamFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, SeamFinder())


register()
