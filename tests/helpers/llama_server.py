"""Stands in for the program `llama-server`: its options, parsed here, for llama.cpp's own server in xllamacpp."""

import argparse
import signal

import xllamacpp

FORMATS = {"none": xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE}


def main() -> None:
    """Serve until a signal comes; an option that the start script should not use is an error."""
    parser = argparse.ArgumentParser(prog="llama-server", allow_abbrev=False)
    parser.add_argument("-m", dest="model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--jinja", action="store_true")
    parser.add_argument("-c", dest="context", type=int, required=True)
    parser.add_argument("-r", dest="stops", action="append", default=[])
    parser.add_argument("--no-prefill-assistant", dest="prefills", action="store_false")
    parser.add_argument("--reasoning-format", choices=FORMATS)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = options.model, [options.alias]
    params.hostnames, params.port = [options.host], options.port
    params.n_ctx, params.n_parallel = options.context, 1
    params.use_jinja, params.prefill_assistant = options.jinja, options.prefills
    params.antiprompt = options.stops
    if options.reasoning_format:
        params.reasoning_format = FORMATS[options.reasoning_format]
    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
