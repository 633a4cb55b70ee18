"""Asks an advisory service whether an installed package has a known vulnerability; says so where none can be asked.

python .ci/audit.py [WORDS FOR pip-audit ...]       # exit status 0 or 1

`pip-audit` counts a package that the service does not know as skipped and still ends with "No known vulnerabilities
found": behind a mirror that serves packages alone, all of them are. So it is counted here what was really looked up.
"""

import json
import subprocess
import sys

SERVICES = ("pypi", "osv")
SECONDS = 120


def audit(service: str, words: list[str]) -> tuple[int, list[str], str]:
    """Packages that were looked up, vulnerabilities, and why nothing was looked up."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--format", "json"]
    command += ["--progress-spinner", "off", "--timeout", "10", "--vulnerability-service", service, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return 0, [], f"no answer in {SECONDS} s"
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = (done.stderr or done.stdout).strip().splitlines()
        return 0, [], lines[-1][:200] if lines else f"exit status {done.returncode}"
    known = [package for package in packages if "skip_reason" not in package]
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'nothing'}"
        for package in known
        for flaw in package["vulns"]
    ]
    skipped = [package["skip_reason"] for package in packages if "skip_reason" in package]
    return len(known), found, f"{len(skipped)} skipped" + (f", the first: {skipped[0]}" if skipped else "")


def main(words: list[str]) -> int:
    """The first service that knows a package decides."""
    for service in SERVICES:
        looked_up, found, why = audit(service, words)
        if looked_up:
            print(f"audit: {looked_up} packages looked up at {service}, {len(found)} known vulnerabilities ({why})")
            print("\n".join(f"  {line}" for line in found), end="\n" if found else "")
            return 1 if found else 0
        print(f"audit: nothing could be looked up at {service}: {why}")
    print("audit: NOT DONE, no advisory service can be reached from here; run it where one can")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
