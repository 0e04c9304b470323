"""A stand-in for the hub on loopback: it answers the calls of huggingface_hub, and remembers what was pushed.

It has org/tiny (the embedded model), org/gated, and what is pushed to it. Uploads are those of the Git LFS protocol,
which huggingface_hub uses with HF_HUB_DISABLE_XET; the calls are those of huggingface_hub 1.33 to 2.4. Not here: the
xet protocol, and pull requests.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import sys
import threading
import traceback
import urllib.parse

from trl_sft.publishing import upload
from trl_sft.recipe import paths

LARGE_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".parquet")  # stored outside of Git
TOKENS = {  # token -> what /api/whoami-v2 answers; of `read-only` every write is refused
    "hf_Writer123456": {
        "name": "me",
        "type": "user",
        "orgs": [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}],
        "auth": {"accessToken": {"displayName": "w", "role": "write"}},
    },
    "hf_Reader123456": {
        "name": "me",
        "type": "user",
        "orgs": [],
        "auth": {"accessToken": {"displayName": "r", "role": "read"}},
    },
}


class Repository:
    """A model repository: its commits, each with all files of its branch."""

    def __init__(self, *, private):
        self.private = private
        self.branches = {"main": [{"oid": "0" * 40, "title": "initial commit", "files": {".gitattributes": b""}}]}

    def find(self, revision):
        """Return the commit of a branch or an oid; None = there is none."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c["oid"] == revision), None)

    @property
    def files(self):
        """The files of the main branch by path."""
        return self.branches["main"][-1]["files"]

    @property
    def titles(self):
        """The first lines of the commits of the main branch, without the initial one."""
        return [commit["title"] for commit in self.branches["main"][1:]]


class HubServer(http.server.ThreadingHTTPServer):
    """The server, with its repositories, large files, requests, and the failures that a test plans."""

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), HubRequest)
        self.repositories, self.large_files = {}, {}
        self.requests, self.failures, self.errors = [], [], []
        self.lock = threading.Lock()

    @property
    def endpoint(self):
        """The value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, pattern, status, *, times=1000, code=None, message=None):
        """Answer the next requests whose `METHOD /path` matches with a status; status 0 closes the connection."""
        self.failures.append({"pattern": pattern, "status": status, "times": times, "code": code, "message": message})

    def take_failure(self, request):
        """Return the planned failure of a request; None = it succeeds."""
        for failure in self.failures:
            if failure["times"] > 0 and re.search(failure["pattern"], request):
                failure["times"] -= 1
                return failure
        return None

    def count(self, pattern):
        """Return how many requests matched."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def handle_error(self, request, client_address):
        """Remember an error of this stand-in; a client that went away is none."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.errors.append(traceback.format_exc())


class HubRequest(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        """Answer by path; planned failures first."""
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        path = urllib.parse.urlsplit(self.path).path
        with self.server.lock:
            self.server.requests.append(f"{self.command} {urllib.parse.unquote(path)}")
            failure = self.server.take_failure(self.server.requests[-1])
            if failure and not failure["status"]:
                self.close_connection = True
                return None
            if failure:
                return self.refuse(failure["status"], failure["code"], failure["message"])
            for pattern, respond in _ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    return respond(self, content, *(urllib.parse.unquote(group or "") for group in match.groups()))
        return self.refuse(404, "RepoNotFound")

    @property
    def account(self):
        """What the token of the request belongs to; None = it has no valid token."""
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def find(self, repo_id, *, writes=False):
        """Return a repository; answer as the hub does and return None where it is absent, private or not writable."""
        repository = self.server.repositories.get(repo_id)
        account = self.account
        names = {account["name"], *(org["name"] for org in account["orgs"])} if account else set()
        if repository is None or (repository.private and repo_id.partition("/")[0] not in names):
            self.refuse(404 if account else 401, "RepoNotFound")
            return None
        if writes and not self.may_write(repo_id.partition("/")[0]):
            self.refuse(403, None, "You don't have the rights to write to this repository")
            return None
        return repository

    def may_write(self, namespace):
        """Tell whether the token of the request may write in a namespace."""
        account = self.account
        if account is None or account["auth"]["accessToken"]["role"] != "write":
            return False
        writable = {org["name"] for org in account["orgs"] if org["roleInOrg"] != "read"}
        return namespace in {account["name"], *writable}

    def whoami(self, _content):
        if self.account is None:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        return self.send_json(self.account)

    def create_repository(self, content):
        wanted = json.loads(content)
        if self.account is None:
            return self.refuse(401, None, "Invalid username or password.")
        namespace = wanted.get("organization") or self.account["name"]
        repo_id = f"{namespace}/{wanted['name']}"
        if not self.may_write(namespace):
            return self.refuse(
                403, None, f'You don\'t have the rights to create a model under the namespace "{namespace}"'
            )
        url = f"{self.server.endpoint}/{repo_id}"
        if repo_id in self.server.repositories:
            return self.send_json({"url": url, "error": "You already created this model repo"}, status=409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.repositories[repo_id] = Repository(private=private)
        return self.send_json({"url": url, "name": repo_id})

    def validate_card(self, content):
        card = json.loads(content)["content"]
        is_valid = card.startswith("---\n")
        answer = {"errors": [] if is_valid else [{"message": "empty or missing yaml metadata"}], "warnings": []}
        return self.send_json(answer, status=200 if is_valid else 400)

    def create_branch(self, content, repo_id, branch):
        if (repository := self.find(repo_id, writes=True)) is None:
            return None
        if branch in repository.branches:
            return self.send_json({"error": "Reference already exists"}, status=409)
        repository.branches[branch] = list(repository.branches["main"])
        return self.send_json({})

    def preupload(self, content, repo_id, revision):
        if (repository := self.find(repo_id, writes=True)) is None:
            return None
        if (commit := repository.find(revision)) is None:
            return self.refuse(404, "RevisionNotFound")
        answers = []
        for file in json.loads(content)["files"]:
            is_large = file["path"].endswith(LARGE_ENDINGS) or file["size"] > 10_000_000
            oid = None
            if (stored := commit["files"].get(file["path"])) is not None:
                header = b"" if is_large else f"blob {len(stored)}\0".encode()
                oid = (hashlib.sha256 if is_large else hashlib.sha1)(header + stored).hexdigest()
            mode = "lfs" if is_large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.send_json({"files": answers, "commitOid": commit["oid"]})

    def batch(self, content, repo_id):
        if self.find(repo_id, writes=True) is None:
            return None
        objects = []
        for entry in json.loads(content)["objects"]:
            if entry["oid"] not in self.server.large_files:
                href = f"{self.server.endpoint}/storage/{entry['oid']}"
                verify = f"{self.server.endpoint}/{repo_id}.git/info/lfs/verify"
                objects.append(entry | {"actions": {"upload": {"href": href}, "verify": {"href": verify}}})
            else:
                objects.append(entry)
        return self.send_json({"transfer": "basic", "objects": objects})

    def store(self, content, oid):
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, None, "the content has another hash")
        self.server.large_files[oid] = content
        return self.send_bytes(b"")

    def verify(self, content, _repo_id):
        entry = json.loads(content)
        return self.send_json(
            {}, status=200 if len(self.server.large_files.get(entry["oid"], b"")) == entry["size"] else 404
        )

    def commit(self, content, repo_id, branch):
        if (repository := self.find(repo_id, writes=True)) is None:
            return None
        if branch not in repository.branches:
            return self.refuse(404, "RevisionNotFound")
        lines = [json.loads(line) for line in content.splitlines()]
        files, title = dict(repository.branches[branch][-1]["files"]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    return self.refuse(400, None, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self.refuse(400, None, f"unknown operation {line['key']}")
        oid = hashlib.sha1(content + str(len(repository.branches[branch])).encode()).hexdigest()
        repository.branches[branch].append({"oid": oid, "title": title, "files": files})
        return self.send_json({"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    def describe(self, _content, repo_id, revision="main"):
        if (repository := self.find(repo_id)) is None:
            return None
        if (commit := repository.find(revision)) is None:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in sorted(commit["files"])]
        card = {}
        if match := re.match(rb"---\n(.*?)\n---", commit["files"].get("README.md", b""), re.DOTALL):
            import yaml

            card = {"cardData": yaml.safe_load(match[1])}
        answer = {"id": repo_id, "sha": commit["oid"], "private": repository.private, "siblings": siblings}
        return self.send_json(answer | card)

    def list_tree(self, _content, repo_id, revision, folder=""):
        if (repository := self.find(repo_id)) is None:
            return None
        if (commit := repository.find(revision)) is None:
            return self.refuse(404, "RevisionNotFound")
        folder = folder.strip("/")
        paths_inside = [path for path in commit["files"] if not folder or path.startswith(f"{folder}/")]
        if folder and not paths_inside:
            return self.refuse(404, "EntryNotFound")
        recursive = "recursive=true" in self.path.lower()
        entries = {}
        for path in paths_inside:
            rest = path[len(folder) + 1 :] if folder else path
            name = path if recursive or "/" not in rest else path[: len(path) - len(rest) + rest.index("/")]
            kind = "file" if name == path else "directory"
            size = len(commit["files"][path]) if name == path else 0
            entries[name] = {"type": kind, "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}
            if kind == "file" and path.endswith(LARGE_ENDINGS):
                sha256 = hashlib.sha256(commit["files"][path]).hexdigest()
                entries[name]["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
        return self.send_json(list(entries.values()))

    def resolve(self, _content, repo_id, revision, path):
        if (repository := self.find(repo_id)) is None:
            return None
        if (commit := repository.find(revision)) is None:
            return self.refuse(404, "RevisionNotFound")
        if path not in commit["files"]:
            return self.refuse(404, "EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha1(commit["files"][path]).hexdigest()}"', "X-Repo-Commit": commit["oid"]}
        return self.send_bytes(commit["files"][path], headers=headers)

    def refuse_gated(self, _content, *_rest):
        return self.refuse(403, "GatedRepo")

    def describe_gated(self, _content):
        return self.send_json({"id": "org/gated", "gated": "manual", "siblings": []})

    def refuse(self, status, code=None, message=None):
        """Answer with an error as the hub writes it."""
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        headers = {name: value for name, value in headers.items() if value}
        return self.send_json({"error": message or code or ""}, status=status, headers=headers)

    def send_json(self, value, *, status=200, headers=None):
        return self.send_bytes(json.dumps(value).encode(), status=status, headers=headers)

    def send_bytes(self, content, *, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "ETag": '"0"', **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", HubRequest.whoami),
    (r"POST /api/repos/create", HubRequest.create_repository),
    (r"POST /api/validate-yaml", HubRequest.validate_card),
    (r"(?:GET|HEAD) /api/models/org/gated(?:/.*)?", HubRequest.describe_gated),
    (r"(?:GET|HEAD) /org/gated/.*", HubRequest.refuse_gated),
    (rf"POST /api/models/{_ID}/branch/([^/]+)", HubRequest.create_branch),
    (rf"POST /api/models/{_ID}/preupload/([^/]+)", HubRequest.preupload),
    (rf"POST /api/models/{_ID}/commit/([^/]+)", HubRequest.commit),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", HubRequest.batch),
    (rf"POST /{_ID}\.git/info/lfs/verify", HubRequest.verify),
    (r"PUT /storage/([0-9a-f]+)", HubRequest.store),
    (rf"(?:GET|HEAD) /api/models/{_ID}/tree/([^/]+)(?:/(.*))?", lambda r, c, i, v, f="": r.list_tree(c, i, v, f or "")),
    (rf"(?:GET|HEAD) /api/models/{_ID}/revision/([^/]+)", HubRequest.describe),
    (rf"(?:GET|HEAD) /api/models/{_ID}", HubRequest.describe),
    (rf"(?:GET|HEAD) /{_ID}/resolve/([^/]+)/(.+)", HubRequest.resolve),
]


@contextlib.contextmanager
def running(port=0):
    """Run the server inside the block, with org/tiny; yield it."""
    server = HubServer(port)
    tiny = Repository(private=False)
    files = {file.name: file.read_bytes() for file in (paths.EMBEDDED / "tiny").iterdir() if file.is_file()}
    tiny.branches["main"].append({"oid": "a" * 40, "title": "files", "files": files})
    server.repositories["org/tiny"] = tiny
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def connected(monkeypatch, *, token="hf_Writer123456"):
    """Run the server and let huggingface_hub of this process speak to it, with a token; waits take no time."""
    from huggingface_hub import constants, utils

    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(utils._http.time, "sleep", lambda _: None)
        monkeypatch.setattr(upload, "_WAITS", (0.0, 0.0))
        monkeypatch.setenv("HF_TOKEN", token)
        yield server
        utils.close_session()
        assert server.errors == []
