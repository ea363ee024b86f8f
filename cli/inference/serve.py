"""`lora serve`: OpenAI's HTTP API for the models of a project, or for a base and adapters."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from cli.options import ADAPTER, DeviceOption, TrustOption, adapter_folder, base_folder, group
from pipeline.errors import UserError, require

app = group()


@app.command()
def serve(
    base: Annotated[
        Path | None,
        Option(
            "--base",
            callback=base_folder,
            help="Model to serve: a folder, .gguf file or hub id; default: the adapters' base, "
            "or without --adapter this project's models.",
        ),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        Option(
            "--adapter", metavar="PATH", parser=adapter_folder, help=f"{ADAPTER} May be repeated."
        ),
    ] = None,
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    host: Annotated[
        str, Option(help="Address to serve; any but a local one needs --api-key.")
    ] = "127.0.0.1",
    api_key: Annotated[
        str | None,
        Option(
            envvar="LORA_API_KEY", help="Key that clients must send; better set in LORA_API_KEY."
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        Option(
            min=1,
            max=1024,
            help="Sequences that are generated together; default: 16 on a CPU, up to 256 on an "
            "accelerator.",
        ),
    ] = None,
    max_waiting: Annotated[
        int, Option(min=1, max=10_000, help="Sequences that may wait; more: status 429.")
    ] = 256,
    max_total_tokens: Annotated[
        int | None,
        Option(
            min=1,
            help="Tokens of all running sequences; default: as many as fit into half of the "
            "free memory.",
        ),
    ] = None,
    engine: Annotated[
        Literal["auto", "own", "vllm"],
        Option(help="What computes; auto: vLLM where it, a GPU and only low-rank adapters are."),
    ] = "auto",
    quantization: Annotated[
        Literal["q8_0"] | None,
        Option(help="Keep the bases' linears in int8; on a CPU. Prints what that changes."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        Option(help="Origin of web pages that may use the server; may be repeated."),
    ] = None,
    allow_lora_path: Annotated[
        list[Path] | None,
        Option(help="Folder in which clients may load adapters; may be repeated."),
    ] = None,
    trust_remote_code: TrustOption = False,
    _device: DeviceOption = None,
) -> None:
    """Serve base and adapters over OpenAI's HTTP API.

    By default the models of this project, on this machine only.
    """
    from cli.console import print_line
    from pipeline.adapters.folder import common_base
    from pipeline.project.stage_graph import ARTIFACTS
    from pipeline.stages.registry import current_project

    require("lora serve")

    from pipeline.certify.vllm import Choice
    from pipeline.inference.http import models, server
    from pipeline.inference.http.q8_0 import Q8Bases

    access = server.Access(host, api_key, allow_origin or ())
    allowed = list(allow_lora_path or ())
    for folder in allowed:
        if not folder.is_dir():
            raise UserError(
                f"--allow-lora-path must be an existing folder, got {folder}. Create it, or name "
                "another."
            )
    if base or adapter:
        named = models.named_models(base or common_base(adapter or ()), adapter or ())
        allowed += adapter or ()

        def scan() -> models.Sources:
            return named
    else:
        project = current_project()
        allowed.append(project.root / ARTIFACTS)
        trust_remote_code = trust_remote_code or project.params.origin.trust_remote_code

        def scan() -> models.Sources:
            return models.project_models(project)

    quantize = Q8Bases() if quantization else None
    given = {"--quantization": quantization, "--max-total-tokens": max_total_tokens}
    unmet = next((name for name, value in given.items() if value), "")
    choice = Choice(engine, trust_remote_code, unmet)
    served = server.HttpServer(
        *(scan, access, port, allowed, trust_remote_code, max_batch, max_waiting, max_total_tokens),
        quantize,
        choice,
    )
    key = 'os.environ["LORA_API_KEY"]' if api_key else '"none"'
    header = ' -H "Authorization: Bearer $LORA_API_KEY"' if api_key else ""
    print_line(f"Serving {served.models.base} at {served.url}/v1, stop with Ctrl-C. Models:")
    for name in served.models.sources:
        print_line(f"  {name}")
    for line in (choice.line, *(quantize.lines if quantize else ())):
        print_line(line)
    print_line(f"Running sequences may have {served.generator.max_tokens:,} tokens in all.")
    print_line(f"Try: curl {served.url}/v1/models{header}")
    print_line(f'or:  OpenAI(base_url="{served.url}/v1", api_key={key})')
    served.run()
