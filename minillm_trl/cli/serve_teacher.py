"""`minillm-trl serve-teacher`: serve a teacher's log-probs to training runs over HTTP."""

import argparse
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from ..errors import MissingPackageError, UserError
from ..teacher_server.addresses import API_KEY
from .arguments import PlainParser, parse_plain
from .option_values import json_object

if TYPE_CHECKING:
    import torch

    from ..teacher_server.service import TeacherService

SECONDS_TO_STOP = 5.0  # for requests in flight

DTYPES = ("auto", "float32", "float16", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = PlainParser(
        "serve-teacher",
        description=__doc__,
        epilog=f"If the environment variable {API_KEY} is set, requests must send this key; training runs read the "
        "same variable.",
    )
    parser.add_argument("--model", required=True, help="name or folder of the teacher, or of an adapter")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="by default half precision on a GPU, float32 on a CPU"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a forward pass (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--model_init_kwargs",
        type=json_object,
        help="further arguments of from_pretrained as JSON, such as quantization_config or device_map",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--allow_pickled_weights", action="store_true", help="load weights that exist only as pickles (.bin)"
    )
    return parser


def run(argv: list[str]) -> int:
    """Parse the arguments, load the teacher, and serve it until the process is stopped."""
    arguments = parse_plain(build_parser(), argv)
    if importlib.util.find_spec("aiohttp") is None:
        raise MissingPackageError(
            "serve-teacher needs aiohttp, which is not installed: pip install 'minillm-trl[server]'"
        )
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size must be positive, got {arguments.batch_size}.")
    if not 0 < arguments.port < 2**16:
        raise UserError(f"--port must lie between 1 and 65535, got {arguments.port}.")
    return _serve(arguments)


def load_service(arguments: argparse.Namespace, name: str) -> "TeacherService":
    """Load the teacher `name` with its tokenizer, as the options `dtype`, `revision` and so on say."""
    import torch

    from ..models.loading import load_tokenizer
    from ..models.teacher import load_teacher, place_teacher
    from ..teacher_server.service import TeacherService

    tokenizer = load_tokenizer(name, arguments.revision, arguments.trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    init_kwargs = dict(arguments.model_init_kwargs or {})
    if arguments.revision is not None:
        init_kwargs["revision"] = arguments.revision
    model = load_teacher(
        name,
        init_kwargs,
        _dtype(arguments.dtype, device),
        arguments.trust_remote_code,
        arguments.allow_pickled_weights,
    )
    model = place_teacher(model, device)
    return TeacherService(model, tokenizer, name, arguments.batch_size)


def _serve(arguments: argparse.Namespace) -> int:
    # these take seconds to import, and `--help` does not need them
    from aiohttp import web

    from ..teacher_server.server import make_app

    service = load_service(arguments, arguments.model)
    listen = arguments.host, arguments.port
    size = service.identity.vocab_size
    if not os.environ.get(API_KEY) and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"Anyone who reaches {arguments.host}:{arguments.port} can use this teacher. To require a key, set "
            f"{API_KEY} here and for the training runs.",
            file=sys.stderr,
        )
    print(
        f"Serving {service.identity.name} in {service.model.dtype} with {size} tokens on http://{listen[0]}:{listen[1]}"
    )
    try:
        app = make_app(service, os.environ.get(API_KEY))
        web.run_app(app, host=listen[0], port=listen[1], print=None, shutdown_timeout=SECONDS_TO_STOP)
    except OSError as error:
        raise UserError(f"Cannot listen on {listen[0]}:{listen[1]}: {error}. Choose another --port.") from error
    return 0


def _dtype(name: str, device: "torch.device") -> "torch.dtype":
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
