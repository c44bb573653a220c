"""Print the free bytes of GPUs that are named as arguments, as JSON; run as a file, loads only torch.

Asking makes a CUDA context on each, which stays for the life of the process that asks.
"""

import json
import sys

import torch

if __name__ == "__main__":
    found = {name: torch.cuda.mem_get_info(torch.device(name))[0] for name in sys.argv[1:]}
    print(json.dumps(found))
