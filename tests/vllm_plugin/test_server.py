"""Servers that load a quantized model answer the client of OpenAI."""

import concurrent.futures
import contextlib
import copy
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

#: Seconds that the server may take to start, on a busy machine.
_START = 300


@contextlib.contextmanager
def running(command, log, **environment):
    """Start a command of watersic with a free port, and return a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "watersic_hf.cli", *command]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | environment)
    try:
        deadline = time.monotonic() + _START
        while not _is_up(port):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def client(folders, tmp_path_factory):
    """A client of vLLM's server of the model ``llama``, packed."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "128"]
    command = ["serve", str(folders["llama"]), *options, "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "WATERSIC_RESIDENCY": "packed"}
    with running(command, log, **settings) as found:
        yield found


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def complete(client, prompt):
    settings = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return client.completions.create(model="tiny", prompt=prompt, **settings)


def test_a_request(client):
    answer = complete(client, [5, 80, 17, 200])

    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].text


def test_a_stream_has_the_same_text(client):
    stream = client.completions.create(
        model="tiny",
        prompt=[5, 80, 17, 200],
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )

    text = "".join(part.choices[0].text for part in stream)

    assert text == complete(client, [5, 80, 17, 200]).choices[0].text


def test_eight_requests_at_once_and_a_malformed_one(client):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(complete, client, [number, 7]) for number in range(8)]
        with pytest.raises(openai.BadRequestError):
            complete(client, [5] * 1000)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt=[5], temperature=-3)

    assert all(answer.result().usage.completion_tokens == 8 for answer in answers)
    assert complete(client, [5, 80]).choices[0].text


def test_transformers_serves_a_quantized_model(folders, tokenizer, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    chatting.save_pretrained(folder)
    command = ["run", "transformers", "serve", str(folder), "--device", "cpu"]

    with running(command, tmp_path / "log") as client:
        answer = client.chat.completions.create(
            model=str(folder), messages=[{"role": "user", "content": "Name it."}], max_tokens=4
        )

    assert answer.choices[0].message.content is not None
