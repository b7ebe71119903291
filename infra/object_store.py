"""A local S3 server for development: holds one bucket in memory until Ctrl-C.

python infra/object_store.py [--port 9000] [--bucket clips] [--folder FOLDER]        needs the `dev` extra
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--bucket", default="clips")
    parser.add_argument("--folder", type=Path, help="whose files the bucket holds at first")
    options = parser.parse_args()
    fill(options.bucket, options.folder)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=options.port, verbose=False)
    server.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{options.port}",
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": "local",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    print(f"s3://{options.bucket} is ready; in the shell of your job:\n")
    for name, value in environment.items():
        print(f"export {name}={value}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.stop()


def fill(bucket: str, folder: Path | None) -> None:
    """Make the bucket, through another server of the same memory: it is whole when it is first seen."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id="local",
        aws_secret_access_key="local",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=bucket)
    if folder:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            client.upload_file(str(file), bucket, file.relative_to(folder).as_posix())
    server.stop()


if __name__ == "__main__":
    main()
