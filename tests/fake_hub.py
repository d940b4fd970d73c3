"""A small Hub for the tests: huggingface_hub 2.x's routes for models, on loopback, in memory."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import _http

USERS = {'hf_me': 'me', 'hf_other': 'other'}  # token -> user
LFS_FROM = 100_000  # bytes

left_loopback: list[str] = []


def stay_on_loopback(set_attribute=setattr) -> None:
    """Refuse, and note in ``left_loopback``, every connection of this process to anywhere else."""
    left_loopback.clear()
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def refuse(host):
        left_loopback.append(str(host))
        raise ConnectionRefusedError(f'a test wanted to reach {host}')

    def checked_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ('127.0.0.1', '::1', 'localhost'):
            refuse(address[0])
        return connect(self, address)

    def checked_look_up(host, *args, **kwargs):
        if host not in ('127.0.0.1', '::1', 'localhost', None):
            refuse(host)
        return look_up(host, *args, **kwargs)

    set_attribute(socket.socket, 'connect', checked_connect)
    set_attribute(socket, 'getaddrinfo', checked_look_up)


@dataclass
class Repository:
    """Branches of commits; a commit is its files, by path."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, '')
        digest = hashlib.sha1(f'{parent} {len(self.commits)}'.encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        return digest

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """Instead of an answer to requests whose line matches: a status, 'hang', or 'drop' (the line breaks).

    With a status perhaps a body; else it is that of a refusal.
    """

    pattern: str
    what: int | str
    body: bytes | None = None


class FakeHub:
    """``with FakeHub() as hub: hub.url``; a test reads ``repositories`` and ``requests`` and sets ``faults``."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.closing = threading.Event()

    def __enter__(self) -> 'FakeHub':
        handler = type('Handler', (_Handler,), {'hub': self})
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit('main', {'.gitattributes': b'*.safetensors filter=lfs\n', **(files or {})})
        return repository

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision)]


def take_for_the_hub(standin: FakeHub, monkeypatch, cache) -> Iterator[FakeHub]:
    """For a fixture: until it ends this process, logged in as 'me', takes a stand-in for the Hub and reaches no other.

    Waits between attempts are left out.
    """
    stay_on_loopback(monkeypatch.setattr)
    template = standin.url + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'ENDPOINT', standin.url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
    for module in (_http, file_download):
        monkeypatch.setattr(module, 'time', SimpleNamespace(time=time.time, sleep=lambda seconds: None))
    monkeypatch.setenv('HF_TOKEN', 'hf_me')
    close_session()
    yield standin
    close_session()
    assert left_loopback == []


@contextlib.contextmanager
def short_patience() -> Iterator[None]:
    """Wait for an answer of the Hub for half a second only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 0.5)
        patch.setattr(file_download, '_ETAG_RETRY_TIMEOUT', 0.5)
        patch.setattr('ccl_timm.hub.publish.ANSWER_SECONDS', 0.5)
        yield


class Refused(Exception):
    def __init__(self, status: int, code: str = '', body: dict | None = None):
        self.status, self.code, self.body = status, code, body or {'error': code or 'refused'}


def _is_large(size: int) -> bool:
    return size >= LFS_FROM


def _oid(content: bytes) -> str:
    if _is_large(len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: FakeHub
    routes = [
        ('POST', r'/api/repos/create', 'create'),
        ('POST', r'/api/validate-yaml', 'validate'),
        ('POST', r'/api/models/([^/]+/[^/]+)/branch/([^/]+)', 'branch'),
        ('POST', r'/api/models/([^/]+/[^/]+)/preupload/([^/]+)', 'preupload'),
        ('POST', r'/api/models/([^/]+/[^/]+)/commit/([^/]+)', 'commit'),
        ('GET', r'/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?', 'info'),
        ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', 'batch'),
        ('POST', r'/lfs/verify', 'verified'),
        ('PUT', r'/lfs/([0-9a-f]{64})', 'store'),
        ('HEAD', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', 'file'),
        ('GET', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', 'file'),
    ]

    def log_message(self, *args):
        pass

    def do(self):
        path = urlsplit(self.path).path
        self.hub.requests.append(f'{self.command} {path}')
        fault = next((f for f in self.hub.faults if re.search(f.pattern, f'{self.command} {path}')), None)
        try:
            if fault and fault.what == 'drop':
                self.rfile.read(min(1000, int(self.headers.get('Content-Length') or 0)))
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            body = self.read_body()
            if fault and fault.what == 'hang':
                self.hub.closing.wait(20)
                self.close_connection = True
                return
            if fault and fault.body is not None:
                return self.answer(fault.body, fault.what)
            if fault:
                raise Refused(fault.what)
            for method, pattern, name in self.routes:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    return getattr(self, name)(body, *(unquote(group or '') for group in match.groups()))
            raise Refused(404)
        except Refused as refusal:
            self.answer(refusal.body, refusal.status, {'X-Error-Code': refusal.code} if refusal.code else {})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = do

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') == 'chunked':
            parts = []
            while size := int(self.rfile.readline().split(b';')[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(parts)
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def answer(self, content: dict | bytes, status: int = 200, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    @property
    def user(self) -> str | None:
        return USERS.get(self.headers.get('Authorization', '').removeprefix('Bearer '))

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.user != repo_id.partition('/')[0]):
            raise Refused(404 if self.user else 401, 'RepoNotFound')
        if write and self.user != repo_id.partition('/')[0]:
            raise Refused(403 if self.user else 401)
        return repository

    def revision(self, repository: Repository, name: str) -> str:
        commit = repository.resolve(name or 'main')
        if commit is None:
            raise Refused(404, 'RevisionNotFound')
        return commit

    def create(self, body):
        asked = json.loads(body)
        if not self.user:
            raise Refused(401)
        owner = asked.get('organization') or self.user
        repo_id = f'{owner}/{asked["name"]}'
        if owner != self.user:
            raise Refused(403)
        if repo_id in self.hub.repositories:
            raise Refused(
                409, body={'error': 'You already created this model repo', 'url': f'{self.hub.url}/{repo_id}'}
            )
        self.hub.add(repo_id, private=asked.get('visibility') == 'private')
        self.answer({'url': f'{self.hub.url}/{repo_id}'})

    def validate(self, body):
        self.answer({'errors': [], 'warnings': []})

    def branch(self, body, repo_id, name):
        repository = self.repository(repo_id, write=True)
        if name in repository.branches:
            raise Refused(409)
        repository.branches[name] = repository.branches['main']
        self.answer({})

    def info(self, body, repo_id, revision):
        repository = self.repository(repo_id)
        commit = self.revision(repository, revision)
        files = [{'rfilename': path} for path in repository.commits[commit]]
        self.answer({'id': repo_id, 'sha': commit, 'private': repository.private, 'tags': [], 'siblings': files})

    def preupload(self, body, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        present = repository.commits[self.revision(repository, revision)]
        self.answer(
            {
                'files': [
                    {
                        'path': file['path'],
                        'uploadMode': 'lfs' if _is_large(file['size']) else 'regular',
                        'shouldIgnore': False,
                        'oid': _oid(present[file['path']]) if file['path'] in present else None,
                    }
                    for file in json.loads(body)['files']
                ]
            }
        )

    def batch(self, body, repo_id):
        self.repository(repo_id, write=True)
        objects = []
        for entry in json.loads(body)['objects']:
            actions = {'upload': {'href': f'{self.hub.url}/lfs/{entry["oid"]}', 'header': {}}}
            actions['verify'] = {'href': f'{self.hub.url}/lfs/verify'}
            objects.append({**entry, **({} if entry['oid'] in self.hub.large else {'actions': actions})})
        self.answer({'transfer': 'basic', 'objects': objects})

    def store(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400)
        self.hub.large[oid] = body
        self.answer({})

    def verified(self, body):
        self.answer({}, 200 if json.loads(body)['oid'] in self.hub.large else 404)

    def commit(self, body, repo_id, branch):
        repository = self.repository(repo_id, write=True)
        head = self.revision(repository, branch)
        files = dict(repository.commits[head])
        for line in map(json.loads, body.splitlines()):
            value = line['value']
            if line['key'] == 'header' and value.get('parentCommit', head) != head:
                raise Refused(412)
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.hub.large[value['oid']]
        digest = repository.commit(branch, files)
        self.answer({'commitOid': digest, 'commitUrl': f'{self.hub.url}/{repo_id}/commit/{digest}'})

    def file(self, body, repo_id, revision, path):
        repository = self.repository(repo_id)
        commit = self.revision(repository, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            headers = {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit}
            return self.answer({'error': 'Entry not found'}, 404, headers)
        headers = {'ETag': f'"{_oid(content)}"', 'X-Repo-Commit': commit}
        if _is_large(len(content)):
            headers |= {'X-Linked-Etag': headers['ETag'], 'X-Linked-Size': str(len(content))}
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        self.answer(content[int(asked[1]) :] if asked else content, 206 if asked else 200, headers)


if __name__ == '__main__':  # for other processes: HF_ENDPOINT=<the address printed> HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_me
    with FakeHub() as hub:
        print(hub.url, flush=True)
        hub.closing.wait()
