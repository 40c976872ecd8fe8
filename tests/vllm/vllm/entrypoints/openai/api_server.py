"""`python -m vllm.entrypoints.openai.api_server FLAGS` becomes `infold serve FLAGS` on the model under test."""

import os
import sys

if __name__ == "__main__":
    from tests.utils import serve_command

    flags = sys.argv[1:]
    at = flags.index("--model")
    command = serve_command(flags[at + 1], flags[:at] + flags[at + 2 :])
    os.execv(command[0], command)
