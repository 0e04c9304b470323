"""run.mirror against a local S3 server (moto): a run goes on at a new host, large files in parts, faults by name."""

import os
import shutil

import fsspec
import pytest
import resumed_runs

from trl_sft.mirroring import snapshot, storage

RECIPE = resumed_runs.MIRRORED.replace("URL", "s3://runs/mine")
pytestmark = pytest.mark.filterwarnings("ignore")  # of moto and botocore
SECRET = "verysecret/Key1234567"


@pytest.fixture(scope="module")
def address():
    """Run a server, and return its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(address, monkeypatch):
    """Return a client of a server with the empty bucket `runs`, which s3fs of this process speaks to."""
    import boto3
    import moto.backends

    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE1234567")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").clear_instance_cache()
    client = boto3.client("s3", endpoint_url=address)
    moto.backends.get_backend("s3").reset()
    client.create_bucket(Bucket="runs")
    yield client
    fsspec.filesystem("s3").clear_instance_cache()


def list_keys(client):
    return [entry["Key"] for entry in client.list_objects_v2(Bucket="runs").get("Contents", [])]


@pytest.mark.long
def test_run_goes_on_at_a_new_host_from_s3_and_ends_equal(go, s3, stop_after):
    assert go(RECIPE, "run.mirror=null", "train.output_dir=whole")[0] == 0
    stop_after(3)
    code, out, err = go(RECIPE)
    assert code == 143, err
    assert "mirror    checkpoint-3 can be fetched from s3://runs/mine" in out
    assert {key.split("/")[1] for key in list_keys(s3)} == {"checkpoint-3", "writer.json"}
    stop_after(None)
    shutil.rmtree("out")
    code, out, err = go(RECIPE)
    assert code == 0, err
    assert "mirror    checkpoint-3 was fetched from s3://runs/mine" in out
    assert resumed_runs.list_differences("out", "whole") == []
    assert {key.split("/")[1] for key in list_keys(s3)} == {"checkpoint-6", "finished", "writer.json"}
    assert SECRET not in out + err


def test_large_file_is_uploaded_in_parts_and_verified_by_its_etag_without_reading_it_back(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART", 6 * 2**20)
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(15 * 2**20))
    target = storage.Storage("s3://runs/large")
    monkeypatch.setattr(storage.Storage, "_read_blocks", lambda *_: pytest.fail("the copy was read back"))
    counts = []
    snapshot.write_snapshot(target, "checkpoint-1", {"weights": path}, count=counts.append)
    assert sum(counts) == 15 * 2**20
    assert s3.head_object(Bucket="runs", Key="large/checkpoint-1/weights")["ETag"].endswith('-3"')


def test_copy_with_other_bytes_is_refused(s3, tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"0123456789")
    target = storage.Storage("s3://runs/damaged")
    real = target._files.put_file

    def put(local, name, **keywords):
        real(local, name, **keywords)
        s3.put_object(Bucket="runs", Key="damaged/checkpoint-1/weights", Body=b"0123456780")

    monkeypatch.setattr(target._files, "put_file", put)
    with pytest.raises(storage.DamagedCopy):
        snapshot.write_snapshot(target, "checkpoint-1", {"weights": path}, count=lambda _: None)


@pytest.mark.parametrize(
    ("url", "variables", "words"),
    [
        ("s3://absent/x", {}, ("no such bucket", "Create the bucket")),
        pytest.param(
            *("s3://runs/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ("cannot be reached", "Check the network")),
            marks=pytest.mark.long,
        ),
        (
            "s3://runs/x",
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"},
            ("Unable to locate credentials", "Set AWS_ACCESS_KEY_ID"),
        ),
    ],
    ids=["bucket", "endpoint", "credentials"],
)
def test_store_that_cannot_be_used_is_refused_by_name_before_the_rows_are_read(
    go, s3, monkeypatch, url, variables, words
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    code, out, err = go(RECIPE, f"run.mirror={url}")
    assert code == 2
    assert all(word in err for word in words), err
    assert "rows" not in out
    assert SECRET not in out + err
