//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/crypto/bcrypt"

	"distkit/testdata/fixture"
)

// distServe is a dist-serve that runs.
type distServe struct {
	*exec.Cmd
	addr string
}

// distServe starts dist-serve on a free port; it ends with the test.
func (p *place) distServe(args ...string) *distServe {
	p.t.Helper()
	s := &distServe{Cmd: p.cmd(`exec dist-serve --listen 127.0.0.1:0 "$@"`, append([]string{"dist-serve"}, args...)...)}
	s.Stderr = os.Stderr
	out, err := s.StdoutPipe()
	if err == nil {
		err = s.Start()
	}
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(s.kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		p.t.Fatalf("dist-serve: %v", err)
	}
	s.addr = strings.TrimSpace(line)
	return s
}

func (s *distServe) kill() {
	_ = s.Process.Signal(syscall.SIGKILL)
	_ = s.Wait()
}

// TestServeConformance: the suite of the OCI distribution specification.
func TestServeConformance(t *testing.T) {
	fixture.Need(t, "oci-conformance")
	p := before(t, http.NotFoundHandler())
	s := p.distServe("--root", "served", "--writable", "--delete")
	out := p.sh(`export OCI_REGISTRY=$0 OCI_TLS=disabled OCI_VERSION=1.1 OCI_API_BLOBS_UPLOAD_CANCEL=true OCI_API_BLOBS_DIGEST_HEADER=true OCI_API_MANIFESTS_DIGEST_HEADER=true
oci-conformance`, s.addr)
	total := regexp.MustCompile(`(?m)^ +Total\.+: +(\d{3,})$`).FindStringSubmatch(out)
	for _, bad := range []string{"FAIL", "Error"} {
		if !regexp.MustCompile(`(?m)^ +` + bad + `\.+: +0$`).MatchString(out) {
			t.Errorf("a count of %s is not 0:\n%s", bad, out)
		}
	}
	if total == nil {
		t.Errorf("it has not run a hundred tests:\n%s", out)
	}
	if _, api, ok := strings.Cut(out, "API conformance:"); !ok || regexp.MustCompile(`: +(Fail|Skip|Error)`).MatchString(api) {
		t.Errorf("not all of the API is there:\n%s", api)
	}
}

// TestServeClients: other projects' clients push to dist-serve and pull from it, over TLS of a private authority and with a
// password; and regctl without.
func TestServeClients(t *testing.T) {
	fixture.Need(t, "jq")
	a := newAuthority(t)
	a.issue(t, "server", x509.ExtKeyUsageServerAuth)
	hash, err := bcrypt.GenerateFromPassword([]byte("word"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	p := before(t, http.NotFoundHandler())
	p.write("users", "me:"+string(hash)+"\n")
	s := p.distServe("--root", "served", "--writable", "--delete", "--htpasswd", "users", "--tls-cert", a.dir+"/server.pem", "--tls-key", a.dir+"/server.key")
	ca, err := os.ReadFile(a.dir + "/ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	p.write("docker-certs/"+s.addr+"/ca.crt", string(ca))
	p.login(s.addr, "me:word")
	p.set("HOST="+s.addr, "CA="+a.dir+"/ca.pem", "CERTS="+p.dir+"/docker-certs/"+s.addr, "DIST_HOSTS_DIR="+p.dir+"/docker-certs")
	p.exchange(s.addr)
	p.sh(`echo '{}' >none.json`)
	p.fails(9, "dist-resolve", `dist-resolve --auth-file none.json "$HOST/by/push" latest`)
	p.sh(`dist-verify --root served && dist-image check --root served by/push:latest`)

	p.run1("regctl", func(q *place) {
		fixture.Need(q.t, "regctl")
		plain := q.distServe("--root", "plain", "--writable")
		q.sh(`export HOME=$PWD
regctl registry set --tls disabled "$0" 2>/dev/null
regctl image copy ocidir://images/tiny:latest "$0/from/regctl:1"
regctl image copy "$0/from/regctl:1" ocidir://back:1
cmp <(regctl manifest get --format raw-body "$0/from/regctl:1") <(regctl manifest get --format raw-body ocidir://images/tiny:latest)
test "$(regctl tag ls "$0/from/regctl")" = 1`, plain.addr)
	})
}

// TestServeEngines: containerd and podman pull from dist-serve and push to it, and have it as mirror of a registry that can't be reached.
func TestServeEngines(t *testing.T) {
	fixture.Need(t, "root,containerd,ctr,podman,jq")
	p := before(t, http.NotFoundHandler())
	p.images()
	p.sh(`export DIST_ROOT=served
dist-pull -q --all-platforms ./images/tiny:latest >digest
for name in docker.io/library/tiny:latest team/tiny:1; do dist-image create "$name" "$(cat digest)" >/dev/null; done`)
	s := p.distServe("--root", "served", "--writable")
	p.set("HOST=" + s.addr)
	p.write("certs.d/docker.io/hosts.toml", `server = "http://127.0.0.1:1"
[host."http://`+s.addr+`"]
  capabilities = ["pull", "resolve"]
`)
	p.write("registries.conf", `[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "`+s.addr+`"
insecure = true
`)
	p.write("containerd.toml", fmt.Sprintf(`version = 3
root = "%[1]s/containerd"
state = "%[1]s/containerd-state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.podsandbox.controller.v1.podsandbox", "io.containerd.nri.v1.nri"]
[grpc]
address = "%[1]s/c.sock"
[ttrpc]
address = "%[1]s/t.sock"
`, p.dir))
	daemon := p.cmd(`exec containerd -c containerd.toml >containerd.log 2>&1`)
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = daemon.Process.Signal(syscall.SIGTERM)
		_ = daemon.Wait()
	})
	p.sh(`ctr() { timeout 60 ctr -a "$PWD/c.sock" "$@" >out 2>&1 || { cat out; return 1; }; }
for _ in {1..300}; do ! ctr version >ready || break; sleep 0.1; done
ctr content fetch --hosts-dir certs.d --all-platforms docker.io/library/tiny:latest
ctr images pull --local --plain-http --all-platforms --snapshotter native "$HOST/team/tiny:1"
ctr images push --local --plain-http "$HOST/from/ctr:1" "$HOST/team/tiny:1"
[ "$(dist-resolve -q "$HOST/from/ctr" 1)" = "$(cat digest)" ]
# The same mirror for this client.
dist-pull -q --hosts-dir certs.d --root mirrored --all-platforms docker.io/library/tiny:latest | cmp - digest`)
	p.sh(`unset REGISTRY_AUTH_FILE DOCKER_CONFIG
podman() { timeout 60 podman --root "$PWD/p" --runroot "$PWD/r" --tmpdir "$PWD/t" --storage-driver vfs "$@"; }
id=$(podman pull -q --tls-verify=false "$HOST/team/tiny:1")
podman push -q --tls-verify=false "$HOST/team/tiny:1" "$HOST/from/podman:1"
[ "$(dist-fetch "$HOST/from/podman" 1 | jq -r .config.digest)" = "sha256:$id" ]
export CONTAINERS_REGISTRIES_CONF=$PWD/registries.conf
[ "$(podman pull -q docker.io/library/tiny:latest)" = "$id" ]
dist-verify --root served`)
}

// TestServeKilled: an upload goes on after the server was killed in the middle of it, whatever was killed and started again.
func TestServeKilled(t *testing.T) {
	fixture.Need(t, "curl")
	p := before(t, http.NotFoundHandler())
	s := p.distServe("--root", "served", "--writable")
	upload := p.sh(`head -c 20000000 /dev/urandom >blob
location=$(curl -sS -D - -X POST "http://$0/v2/x/blobs/uploads/" | tr -d '\r' | sed -n 's/^Location: //p')
curl -sS -o /dev/null -X PATCH -H 'Content-Type: application/octet-stream' --data-binary @<(head -c 5000000 blob) "http://$0$location"
echo "$location"`, s.addr)
	cut := p.cmd(`curl -sS --limit-rate 4M -o /dev/null -X PATCH -H 'Content-Range: 5000000-19999999' --data-binary @<(tail -c +5000001 blob) "http://$0$1" || true`, s.addr, upload)
	if err := cut.Start(); err != nil {
		t.Fatal(err)
	}
	p.sh(`until [ "$(stat -c %s served/ingest/*/data)" -gt 6000000 ]; do sleep 0.01; done`)
	s.kill()
	if err := cut.Wait(); err != nil {
		t.Fatal(err)
	}
	s = p.distServe("--root", "served", "--writable")
	p.sh(`range=$(curl -sS -D - "http://$0$1" | tr -d '\r' | sed -n 's/^Range: 0-//p')
[[ $range =~ ^[0-9]+$ && $range -ge 5999999 ]]
at=$((range + 1)) digest=sha256:$(sha256sum <blob | cut -d' ' -f1)
curl -sS --fail -X PATCH -H "Content-Range: $at-19999999" --data-binary @<(tail -c "+$((at + 1))" blob) "http://$0$1"
curl -sS --fail -X PUT "http://$0$1?digest=$digest"
curl -sS --fail "http://$0/v2/x/blobs/$digest" | cmp - blob
dist-verify --root served && test -z "$(dist-active --root served)"`, s.addr, upload)
}

// TestServeFullDisk: an upload that does not fit is refused and leaves nothing, and one that fits is taken.
func TestServeFullDisk(t *testing.T) {
	fixture.Need(t, "root,tmpfs,curl")
	p := before(t, http.NotFoundHandler())
	p.sh(`mkdir served && mount -t tmpfs -o size=8m tmpfs served`)
	t.Cleanup(func() { p.sh(`umount served`) })
	s := p.distServe("--root", "served/store", "--writable")
	defer s.kill() // before it is unmounted
	p.sh(`push() {
	curl -sS -o reply -w '%{http_code}' -X POST -H 'Content-Type: application/octet-stream' --data-binary @"$1" \
		"http://$0/v2/x/blobs/uploads/?digest=sha256:$(sha256sum <"$1" | cut -d' ' -f1)"
}
head -c 9000000 /dev/urandom >large
head -c 4000000 /dev/urandom >small
# The server does not read the rest, so a slow client may lose the reply with the connection.
for n in 1 2 3 4 5; do ! status=$(push large) || break; done
test "$status" = 507
grep -q DENIED reply
test -z "$(dist-active --root served/store)"
test "$(push small)" = 201
dist-verify --root served/store`, s.addr)
}

// TestServeSockets: a socket in the file system, and one that a supervisor passes.
func TestServeSockets(t *testing.T) {
	fixture.Need(t, "curl,jq")
	p := before(t, http.NotFoundHandler())
	c := p.cmd(`exec dist-serve --root served --listen unix:sock >address`)
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	p.sh(`until [ -s address ]; do sleep 0.01; done
test "$(stat -c %a sock)" = 600
test "$(curl -sS --fail --unix-socket sock http://x/v2/_catalog | jq -c .repositories)" = '[]'`)
	_ = c.Process.Kill()
	_ = c.Wait()
	// The socket that was left is taken over.
	p.sh(`dist-serve --root served --listen unix:sock >again & pid=$!
until [ -s again ]; do sleep 0.01; done
curl -sS --fail --unix-socket sock http://x/v2/
kill $pid; ! wait $pid`)
	l, err := filepath.Abs(p.dir)
	if err != nil {
		t.Fatal(err)
	}
	passed := listenUnix(t, l+"/passed")
	c = p.cmd(`exec 3<&3; export LISTEN_PID=$$ LISTEN_FDS=1; exec dist-serve --root served`)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr, c.ExtraFiles = &out, &errs, []*os.File{passed}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	p.sh(`curl -sS --fail --unix-socket passed http://x/v2/`)
	_ = c.Process.Signal(syscall.SIGTERM)
	if err := c.Wait(); fmt.Sprint(err) != "signal: terminated" || errs.Len() > 0 {
		t.Errorf("it ended with %v, %q", err, errs.String())
	}
}

// listenUnix is a listening socket, as a file.
func listenUnix(t *testing.T, path string) *os.File {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
