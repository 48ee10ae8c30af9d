"""A site's process that answers each parcel with the same tensors: `python echo_site.py FOLDER`."""

import json
import sys
import time
from pathlib import Path

from shoal.deploy.bridge import ADDRESS
from shoal.deploy.parcel import Parcel, read_parcel, write_parcel
from shoal.processes.messages import receive, send
from shoal.runs.files import write_json
from shoal.sites.address import Address


def main(folder: Path) -> None:
    address = Address.create()
    server = address.listen()
    server.setblocking(True)
    write_json(folder / ADDRESS, {"socket": str(address.folder)})
    try:
        while True:
            stream, _ = server.accept()
            with stream:
                received = receive(stream)
                assert received is not None
                assert received[1] is not None
                assert received[0]["key"] == address.key
                parcel = read_parcel(received[1])
                time.sleep(parcel.meta.get("sleep", 0))
                answer = Parcel(meta={"site": folder.name, "was": dict(parcel.meta)}, tensors=parcel.tensors)
                send(stream, {}, write_parcel(answer))
    finally:
        address.remove()


if __name__ == "__main__":
    print(json.dumps({"echo": sys.argv[1]}), flush=True)
    main(Path(sys.argv[1]))
