"""The pod of a rendered StatefulSet as a process: arguments, environment, volumes and probes, without Kubernetes."""

import base64
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import requests
import urllib3

from tests.support.commands import run
from tests.support.exporter import ROOT
from tests.support.kubernetes import Manifest, one
from tests.support.processes import Daemon

USER = 65534
_OF_ETC = ("ssl", "passwd", "group", "nsswitch.conf", "hosts", "resolv.conf", "ld.so.cache", "localtime")


@cache
def can_isolate() -> bool:
    """Tell whether this machine lets the tests have mounts of their own."""
    return (
        os.geteuid() == 0
        and all(shutil.which(program) for program in ("unshare", "setpriv", "chroot", "mount"))
        and run("unshare", "--mount", "--propagation=private", "mount", "-t", "tmpfs", "none", "/mnt").returncode == 0
    )


def write_volume(directory: Path, files: Mapping[str, str]) -> None:
    """Lay files out as the kubelet does: links to `..data`, which links to a folder that is replaced as a whole."""
    directory.mkdir(parents=True, exist_ok=True)
    generation = directory / f"..{len(list(directory.iterdir()))}"
    generation.mkdir()
    for name, text in files.items():
        (generation / name).write_text(text)
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(f"..data/{name}")
    new = directory / "..data_tmp"
    new.symlink_to(generation.name)
    new.replace(directory / "..data")


class Pod(Daemon):
    """Run the container of a StatefulSet; `secrets` are the Secrets that are not among the manifests.

    Isolated, it is user 65534 with a root of its own, read-only but for what the manifest mounts. Else the paths of its
    volumes become folders of the test.
    """

    def __init__(
        self,
        directory: Path,
        manifests: list[Manifest],
        port: int,
        secrets: Mapping[str, Mapping[str, str]],
        *,
        isolated: bool,
    ) -> None:
        directory.mkdir(exist_ok=True)
        super().__init__(directory / "pod.log")
        self.root, self.port, self.isolated = directory, port, isolated
        self.manifests, self.secrets = manifests, secrets
        spec = one(manifests, "StatefulSet")["spec"]
        self.pod: dict[str, Any] = spec["template"]["spec"]
        (self.container,) = self.pod["containers"]
        claims = [{"name": claim["metadata"]["name"], "emptyDir": {}} for claim in spec.get("volumeClaimTemplates", [])]
        self.volumes = {volume["name"]: volume for volume in [*self.pod.get("volumes", []), *claims]}
        self.mounts = {mount["mountPath"]: mount for mount in self.container.get("volumeMounts", [])}
        for mount in self.mounts.values():
            self._make(self.volumes[mount["name"]])

    def folder(self, volume: str) -> Path:
        """Return where the content of a volume lies."""
        return self.root / "volumes" / volume

    def files_of(self, volume: Mapping[str, Any]) -> dict[str, str]:
        """Return the files of a ConfigMap or Secret."""
        if "configMap" in volume:
            found: dict[str, str] = one(self.manifests, "ConfigMap", volume["configMap"]["name"])["data"]
            return found
        name = volume["secret"]["secretName"]
        if name in self.secrets:
            return dict(self.secrets[name])
        data = one(self.manifests, "Secret", name)["data"]
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    def _make(self, volume: Mapping[str, Any]) -> None:
        folder = self.folder(volume["name"])
        if "configMap" in volume or "secret" in volume:
            files = self.files_of(volume)
            if not self.isolated:
                files = {name: self._moved(text) for name, text in files.items()}
            write_volume(folder, files)
        else:
            folder.mkdir(parents=True)
        if os.geteuid() == 0:
            group = self.pod["securityContext"]["fsGroup"]
            for path in (folder, *folder.rglob("*")):
                os.chown(path, -1, group, follow_symlinks=False)
            folder.chmod(0o2770)

    def _moved(self, text: str) -> str:
        for path, mount in self.mounts.items():
            text = text.replace(f"{path}/", f"{self.folder(mount['name'])}/")
        return text

    def environment(self) -> Mapping[str, str]:
        return {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"} | {
            each["name"]: each["value"] for each in self.container.get("env", [])
        }

    def directory(self) -> Path:
        return self.folder("data") if "/data" in self.mounts else self.root

    def command(self) -> Sequence[str]:
        program = [sys.executable, str(ROOT / "exporter.py")]
        if not self.isolated:
            return [*program, *(self._moved(argument) for argument in self.container["args"])]
        security = self.pod["securityContext"]
        script = self._root_script() + shlex.join(
            [
                *(
                    "exec",
                    str(shutil.which("chroot")),
                    str(self.root / "root"),
                    str(shutil.which("setpriv")),
                    "--no-new-privs",
                ),
                *(f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}"),
                *(f"--groups={security['fsGroup']}", "--bounding-set=-all", "--inh-caps=-all"),
                *("sh", "-c", 'cd /data && exec "$@"', "sh"),
                *(*program, *self.container["args"]),
            ]
        )
        return ["unshare", "--mount", "--propagation=private", "sh", "-euc", script]

    def _root_script(self) -> str:
        """Return the commands that build the root: what Python needs, the volumes, and nothing that can be written."""
        root = self.root / "root"
        root.mkdir(exist_ok=True)
        needed = {
            *(Path("/usr"), ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()),
            *(Path("/etc") / name for name in _OF_ETC),
        }
        lines = [f"mount -t tmpfs -o mode=0755 tmpfs {root}", f"mkdir {root}/data {root}/tmp"]
        for path in sorted(path for path in needed if path.exists() and not needed & set(path.parents)):
            lines += self._bound(path, path, "ro")
        lines += [
            f"cp -P /{name} {root}/{name}" for name in ("bin", "sbin", "lib", "lib64") if Path(f"/{name}").is_symlink()
        ]
        for name in ("dev", "proc"):
            lines += [f"mkdir {root}/{name}", f"mount --rbind /{name} {root}/{name}"]
        for mounted, mount in self.mounts.items():
            lines += self._bound(self.folder(mount["name"]), Path(mounted), "ro" if mount.get("readOnly") else "rw")
        if self.container["securityContext"]["readOnlyRootFilesystem"]:
            lines.append(f"mount -o remount,ro {root}")
        return "".join(f"{line}\n" for line in lines)

    def _bound(self, source: Path, path: Path, mode: str) -> list[str]:
        target = shlex.quote(f"{self.root / 'root'}{path}")
        made = f"mkdir -p {target}" if source.is_dir() else f"mkdir -p $(dirname {target}); touch {target}"
        quoted = shlex.quote(str(source.resolve()))
        return [made, f"mount --bind {quoted} {target}", f"mount -o remount,bind,{mode} {target}"]

    def probe(self, name: str) -> bool:
        """Ask as the kubelet would: any certificate will do, it has no user, and 200 to 399 is success."""
        probe = self.container[name]
        if "tcpSocket" in probe:
            assert probe["tcpSocket"]["port"] == self.container["ports"][0]["name"]
            with socket.create_connection(("127.0.0.1", self.port), probe["timeoutSeconds"]):
                return True
        get = probe["httpGet"]
        assert get["port"] == self.container["ports"][0]["name"]
        url = f"{get.get('scheme', 'HTTP').lower()}://127.0.0.1:{self.port}{get['path']}"
        with requests.Session() as session:
            session.trust_env = False
            session.headers.update({header["name"]: header["value"] for header in get.get("httpHeaders", [])})
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
            answer = session.get(url, verify=False, timeout=probe["timeoutSeconds"], allow_redirects=False)
        return 200 <= answer.status_code < 400

    def ready(self) -> bool:
        return self.probe("livenessProbe")
