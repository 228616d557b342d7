"""Every command of the project: ``nox -s bench``, ``nox -s tests``, and the rest of ``nox --list``.

Third-party packages are installed from ``uv.lock`` with their hashes checked, from whichever index this machine
uses; then the workspace's own packages, without their dependencies. An environment is set up once and kept: a
second run starts at once unless the lock or a ``pyproject.toml`` changed.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types", "imports"]
# nox then makes an environment anew when it is run under another Python.
os.environ.setdefault("NOX_ENABLE_STALENESS_CHECK", "1")
# Without bytecode in the environments each process of a benchmark would compile five thousand modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).resolve().parent
CORE = "core"
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
MEMBERS = [*(f"packages/{name}" for name in PACKAGES), "runner"]
SOURCES = [str(ROOT / member / "src") for member in MEMBERS]

EVERYTHING = ["--all-packages", "--all-extras", "--group", "test"]
# Tests of the packages' native code that its sanitizers run.
NATIVE_TESTS = {"cpu-runtime": ("kernels", "packing", "attention"), "sequence": ("conv", "conv_native", "norm")}
OFFLINE = {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
INDEX_VARIABLES = (
    "UV_DEFAULT_INDEX",
    "UV_INDEX",
    "UV_INDEX_URL",
    "UV_EXTRA_INDEX_URL",
    "UV_FIND_LINKS",
    "UV_NO_INDEX",
)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests of every package, of the runner and of the tools; arguments go to pytest."""
    build = require_build_tools(session)
    install(session, EVERYTHING, members=MEMBERS)
    side_by_side = ["-n", "logical", "--dist", "loadfile"]
    session.run("python", "-m", "pytest", "-rfs", *side_by_side, *session.posargs, env=build | OFFLINE)


@nox.session
@nox.parametrize("build", ["address", "undefined", "emulated"], ids=["address", "undefined", "emulated"])
def kernels(session: nox.Session, build: str) -> None:
    """Test the native kernels under a sanitizer, or with the instructions emulated that this processor lacks."""
    environment = require_build_tools(session) | OFFLINE
    packages = ["cpu-runtime"] if build == "emulated" else sorted(NATIVE_TESTS)
    chosen = [argument for name in packages for argument in ("--package", distribution(name))]
    install(session, chosen, ["--only-group", "test"])
    option = "PARETO_EMULATE=ON" if build == "emulated" else f"PARETO_SANITIZE={build}"
    uv_pip(session, "install", "--no-deps", str(ROOT / "packages" / CORE))
    for name in packages:
        folder = str(Path(session.create_tmp()) / f"build-{name}")
        settings = ["-C", f"cmake.define.{option}", "-C", f"build-dir={folder}", "-C", "install.strip=false"]
        reinstall = ["--reinstall-package", distribution(name), str(ROOT / "packages" / name)]
        uv_pip(session, "install", "--no-deps", *settings, *reinstall)
    if build == "address":
        # The sanitizer must be loaded before Python is, and with it the library that throws C++'s exceptions.
        compiler = environment.get("CXX", os.environ.get("CXX", "c++"))
        names = ["-print-file-name=libasan.so", "-print-file-name=libstdc++.so.6"]
        found = [str(session.run(compiler, name, silent=True, external=True)).strip() for name in names]
        environment |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    elif build == "undefined":
        environment |= {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    tests = [f"packages/{package}/tests/test_{name}.py" for package in packages for name in NATIVE_TESTS[package]]
    session.run("python", "-m", "pytest", *tests, *session.posargs, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting, and that uv.lock is up to date and names neither an index nor a machine."""
    install(session, ["--only-group", "lint"])
    session.run("python", "tools/lock.py", "check", "uv.lock")
    # Settings of an index would make uv resolve again in order to write that index into the lock.
    neutral = dict.fromkeys(INDEX_VARIABLES) | {"UV_NO_CONFIG": "1", "UV_OFFLINE": "1"}
    session.run("uv", "lock", "--check", "--python", python_of(session), env=neutral, external=True)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the core's types with mypy, strictly."""
    install(session, ["--package", "pareto-core", "--all-extras"], ["--only-group", "types"])
    session.run("mypy", *session.posargs)


@nox.session
def imports(session: nox.Session) -> None:
    """Check that imports run one way: runner, packages, core."""
    install(session, ["--only-group", "imports"])
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": os.pathsep.join(SOURCES)})


@nox.session(reuse_venv=False)
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def alone(session: nox.Session, package: str) -> None:
    """Install one package's wheel with the core's alone, and run the example of its README."""
    example = readme_example(session, package)
    folder = Path(session.create_tmp())
    wheels = folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    for member in sorted({CORE, package}):
        source = str(ROOT / "packages" / member)
        session.run(
            "uv", "build", "--wheel", "-q", "--out-dir", str(wheels), source, env=index_settings(), external=True
        )
    install(session, ["--package", distribution(package)])
    uv_pip(session, "install", "--no-deps", *(str(path) for path in sorted(wheels.glob("*.whl"))))
    uv_pip(session, "check")
    script = folder / "readme_example.py"
    script.write_text(example, encoding="utf-8")
    session.chdir(folder)
    session.run("python", "-I", script.name, env=OFFLINE)
    session.chdir(ROOT)
    # A gigabyte or more per package, of no use to the next run, which starts afresh.
    shutil.rmtree(session.virtualenv.location)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmark on this machine: accuracy, memory and latency side by side; arguments go to `pareto bench`."""
    build = require_build_tools(session)
    install(session, EVERYTHING, members=MEMBERS)
    command = ["pareto", "bench", *session.posargs]
    session.log(f"{shlex.join(command)}: figures go to results/ and to MLflow; see them with: nox -s ui")
    session.run(*command, env=build)


@nox.session
def ui(session: nox.Session) -> None:
    """Open MLflow's pages on the benchmarks' store; arguments go to `pareto ui`."""
    install(session, EVERYTHING, members=MEMBERS)
    session.run("pareto", "ui", *session.posargs)


@nox.session
def lock(session: nox.Session) -> None:
    """Resolve uv.lock and take the index's name out of it; `-- --upgrade` takes the newest versions."""
    # Files of a local folder are no use to other machines, so a resolution does not look there.
    environment = index_settings() | {"UV_FIND_LINKS": None}
    session.run("uv", "lock", "--python", python_of(session), *session.posargs, env=environment, external=True)
    session.run("python", "tools/lock.py", "rewrite", "uv.lock")


@nox.session
def dev(session: nox.Session) -> None:
    """Make or update an editable .venv with all packages, extras and tools, for an editor and `pareto`."""
    session.run("uv", "venv", "--allow-existing", "--python", python_of(session), ".venv", external=True)
    requirements = export(session, [*EVERYTHING, "--all-groups"])
    python = ".venv/bin/python"
    uv_pip(session, "install", "--require-hashes", "-r", requirements, python=python)
    uv_pip(session, "install", "--no-deps", *editable(MEMBERS), python=python)
    session.log("ready: source .venv/bin/activate")


# Setting up


def install(session: nox.Session, *exports: list[str], members: list[str] | None = None) -> None:
    """Make the session's environment hold what `exports` select from the lock, and `members` as editables.

    Each of `exports` is a list of arguments to ``uv export``. Nothing is done if the environment already
    holds just that.
    """
    if sys.platform != "linux":
        session.error(f"uv.lock covers Linux, and this is {sys.platform}; see CONTRIBUTING.md, 'How the lock is kept'")
    members = members or []
    stamp = Path(session.virtualenv.location) / "pareto-installed"
    wanted = fingerprint(exports, members)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    stamp.unlink(missing_ok=True)
    session.log("setting up the environment from uv.lock")
    requirements = [export(session, arguments, number) for number, arguments in enumerate(exports)]
    uv_pip(session, "sync", "--require-hashes", *requirements)
    if members:
        uv_pip(session, "install", "--no-deps", *editable(members))
    stamp.write_text(wanted, encoding="utf-8")


def fingerprint(exports: tuple[list[str], ...], members: list[str]) -> str:
    """Hash what an environment is made from: the lock, every pyproject.toml, and what of them it takes."""
    files = [ROOT / "uv.lock", ROOT / "pyproject.toml", *(ROOT / member / "pyproject.toml" for member in MEMBERS)]
    # What is compiled when a member is installed.
    for member in members:
        files += sorted([*(ROOT / member).glob("CMakeLists.txt"), *(ROOT / member).glob("native/**/*.*")])
    digest = hashlib.sha256(repr((str(ROOT), exports, members)).encode())
    for path in files:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def export(session: nox.Session, arguments: list[str], number: int = 0) -> str:
    """Write requirements with hashes for one selection of the lock; return the file's path."""
    if not (ROOT / "uv.lock").is_file():
        session.error("uv.lock is not there; make it with: nox -s lock")
    path = str(Path(session.create_tmp()) / f"requirements-{number}.txt")
    command = ["uv", "export", "--frozen", "--no-emit-workspace", "--no-annotate", "--no-header", "-q"]
    session.run(*command, "--python", python_of(session), *arguments, "-o", path, external=True, silent=True)
    return path


def editable(members: list[str]) -> list[str]:
    """Return the arguments that install workspace members as editables."""
    return [argument for member in members for argument in ("-e", str(ROOT / member))]


def uv_pip(session: nox.Session, action: str, *arguments: str, python: str | None = None) -> None:
    """Run ``uv pip`` on the session's environment, or on that of `python`."""
    target = ["--python", python or python_of(session)]
    session.run("uv", "pip", action, *target, *arguments, env=index_settings(), external=True)


def python_of(session: nox.Session) -> str:
    """Return the path of the interpreter that the session uses."""
    return str(Path(session.virtualenv.location).resolve() / "bin" / "python")


def distribution(package: str) -> str:
    """Return the distribution's name of ``packages/<package>``."""
    return f"pareto-{package}"


def index_settings() -> dict[str, str | None]:
    """Hand pip's index and certificates to uv, where uv has none of its own.

    uv does not read pip's configuration, and a machine that reaches its packages through a mirror may have
    set up pip alone.
    """
    environment: dict[str, str | None] = {"UV_HTTP_TIMEOUT": os.environ.get("UV_HTTP_TIMEOUT", "300")}
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    # pip lists its environment variables first, and those win over its files.
    settings = reversed(re.findall(r"^(\S+)=(.*)$", listing, re.M))
    pip = {key.rpartition(".")[2]: value.strip("'\"") for key, value in settings}
    user = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "uv" / "uv.toml"
    configured = any(name in os.environ for name in (*INDEX_VARIABLES, "UV_CONFIG_FILE"))
    if "index-url" in pip and not configured and not user.is_file() and not Path("/etc/uv/uv.toml").is_file():
        environment["UV_DEFAULT_INDEX"] = pip["index-url"]
    if "cert" in pip and "SSL_CERT_FILE" not in os.environ:
        environment["SSL_CERT_FILE"] = pip["cert"]
    return environment


# Checks before anything is installed


def require_build_tools(session: nox.Session) -> dict[str, str]:
    """Stop, saying what to install, unless DeepSpeed will be able to compile its operator.

    DeepSpeed compiles a shared-memory operator through PyTorch when training first starts on a CPU; PyTorch runs
    ``$CXX`` or ``c++``. Returns the environment variables that point it to the compiler found.
    """
    asked = os.environ.get("CXX")
    candidates = [shlex.split(asked)[0]] if asked and asked.strip() else ["c++", "g++", "clang++"]
    compiler = next((name for name in candidates if shutil.which(name)), None)
    if compiler is None:
        looked_for = f"CXX={asked}" if asked else "neither $CXX is set nor c++, g++ or clang++ on PATH"
        session.error(
            f"no C++ compiler ({looked_for}), and DeepSpeed compiles an operator when training starts: install one "
            "(Debian, Ubuntu: apt-get install g++; Fedora, RHEL: dnf install gcc-c++) or point CXX to one"
        )
    code = "import sysconfig; print(sysconfig.get_path('include'))"
    include = str(session.run("python", "-c", code, silent=True, log=False)).strip().splitlines()[-1]
    if not Path(include, "Python.h").is_file():
        session.error(
            f"no Python headers ({include}/Python.h), and DeepSpeed compiles an operator when training starts: install "
            "them (Debian, Ubuntu: apt-get install python3-dev; Fedora, RHEL: dnf install python3-devel)"
        )
    return {} if asked or compiler == "c++" else {"CXX": compiler}


def readme_example(session: nox.Session, package: str) -> str:
    """Return the Python blocks of a package's README, in order, as one script."""
    readme = ROOT / "packages" / package / "README.md"
    blocks = re.findall(r"^```python\n(.*?)^```", readme.read_text(encoding="utf-8"), re.M | re.S)
    if not blocks:
        session.error(f"{readme.relative_to(ROOT)} has no ```python block to run as an example")
    return "\n".join(blocks)
