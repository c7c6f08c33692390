"""Start LLaMA-Factory's WebUI on this machine only, with the embedded model, bundled data and CrossLore chosen.

python scripts/webui.py            # http://127.0.0.1:7860; GRADIO_SERVER_PORT picks another port
"""

import os
import sys
from pathlib import Path

import yaml
from get_model import DEFAULT_OUTPUT

ROOT = Path(__file__).resolve().parents[1]
# LLaMA-Factory's page keeps what its user chose last here, beside the folder that it is started in.
USER_CONFIG = Path("llamaboard_cache") / "user_config.yaml"
DEFAULTS = {
    "GRADIO_SERVER_NAME": "127.0.0.1",
    "CROSSLORE_WEBUI_DATASET": "crosslore_restaurants",
    "CROSSLORE_WEBUI_TEMPLATE": "chatml",
}


def prepare(folder: Path) -> None:
    """Choose the embedded model, unless the page was used in this folder before."""
    path = folder / USER_CONFIG
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    place = os.path.relpath(DEFAULT_OUTPUT, folder)
    config = {"lang": "en", "hub_name": None, "last_model": "Custom", "path_dict": {"Custom": place}, "cache_dir": None}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def main() -> None:
    """Become `llamafactory-cli webui`."""
    prepare(ROOT)
    os.chdir(ROOT)
    binaries = Path(sys.executable).parent
    environment = {**DEFAULTS, **os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}
    print("Starting the page; its address follows within a minute. Ctrl-C ends it.", flush=True)
    os.execve(binaries / "llamafactory-cli", ["llamafactory-cli", "webui"], environment)


if __name__ == "__main__":
    main()
