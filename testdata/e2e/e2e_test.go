//go:build e2e

// Package e2e tests distkit together with other projects' programs: Debian's registry and olareg, an image of Debian's
// packages, runc and crun, overlayfs, skopeo, umoci, crane, oras and regctl.
package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"distkit/testdata/fixture"
	"distkit/testdata/registry/faults"
)

const (
	image  = "docker.io/library/redis:latest" // an index
	single = "docker.io/library/redis:single" // the manifest in it
)

func TestMain(m *testing.M) { fixture.Main(m) }

// place is a directory with an environment, in which commands run.
type place struct {
	*fixture.World
	t      *testing.T
	dir    string
	before string // runs before each command, in a mount namespace of its own

	shutdown func() // ends the host that boot started
}

// here makes a place for Debian's registry, which has the image.
func here(t *testing.T) *place {
	t.Helper()
	fixture.Need(t, "root,docker-registry,skopeo,jq")
	target, err := dockerRegistry()
	if err != nil {
		t.Fatal(err)
	}
	return before(t, quiet(httputil.NewSingleHostReverseProxy(target)))
}

// before makes a place for a registry.
func before(t *testing.T, registry http.Handler) *place {
	t.Helper()
	top := fixture.TempDir(t, fixture.Dir, "e2e")
	p := &place{t: t, dir: filepath.Join(top, "here")}
	if err := os.Mkdir(p.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var err error
	if p.World, err = fixture.Surround(filepath.Join(top, "world"), registry); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// quiet drops the proxy's messages about clients that disconnect.
func quiet(p *httputil.ReverseProxy) http.Handler {
	p.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) }
	return p
}

// dockerRegistry starts Debian's registry with the image, once. It ends with the tests.
func dockerRegistry() (*url.URL, error) {
	if started.target == nil && started.err == nil {
		started.target, started.err = startRegistry()
	}
	return started.target, started.err
}

var started struct {
	target *url.URL
	err    error
	held   io.Closer // only this process has it open; when it is closed, the registry ends
}

func startRegistry() (*url.URL, error) {
	dir := filepath.Join(fixture.Dir, "docker-registry")
	addr, held, err := serve("docker-registry", dir, "", "", http.DefaultClient)
	if err != nil {
		return nil, err
	}
	started.held = held
	layout := filepath.Join(fixture.Dir, "debian")
	for _, args := range [][]string{
		{filepath.Join(fixture.Root, "testdata/images/debian.sh"), layout},
		{"skopeo", "copy", "--all", "--dest-tls-verify=false", "oci:" + layout + ":latest", "docker://" + addr + "/library/redis:latest"},
		{"skopeo", "copy", "--dest-tls-verify=false", "oci:" + layout + ":manifest", "docker://" + addr + "/library/redis:single"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%v: %w\n%s", args, err, out)
		}
	}
	return &url.URL{Scheme: "http", Host: addr}, nil
}

// serve starts a distribution registry, of which Debian's docker-registry is an old version, in its own directory. More
// and tls are parts of its configuration. It ends when held is closed, at the latest with this process.
func serve(program, dir, more, tls string, client *http.Client) (addr string, held io.Closer, err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", nil, err
	}
	scheme := "http"
	if tls != "" {
		scheme, tls = "https", ", tls: {"+tls+"}"
	}
	bounded := *client
	bounded.Timeout = 10 * time.Second
	// The registry can't choose a free port itself. Another program may take the port that was free here.
	for range 5 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", nil, err
		}
		addr = l.Addr().String()
		l.Close()
		conf := fmt.Sprintf("version: 0.1\nlog: {level: warn, accesslog: {disabled: true}}\n"+
			"storage: {filesystem: {rootdirectory: %q}, delete: {enabled: true}}\nhttp: {addr: %q, secret: none%s}\n%s\n", dir+"/data", addr, tls, more)
		if err := os.WriteFile(dir+"/config.yml", []byte(conf), 0o600); err != nil {
			return "", nil, err
		}
		held, err = serveAt(program, dir, &bounded, scheme+"://"+addr+"/v2/")
		if !errors.Is(err, unix.EADDRINUSE) {
			return addr, held, err
		}
	}
	return "", nil, unix.EADDRINUSE
}

// serveAt starts a registry with the configuration in the directory, and waits until the URL responds.
func serveAt(program, dir string, client *http.Client, url string) (io.Closer, error) {
	log, err := os.Create(dir + "/log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	// When this process ends, the shell's standard input ends, and the shell ends the registry.
	c := exec.Command("sh", "-c", `"$1" serve "$0" & read -r _; kill $!; wait`, dir+"/config.yml", program)
	c.Stdout, c.Stderr = log, log
	stdin, err := c.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	go func() { _ = c.Wait() }()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		resp, err := client.Get(url)
		if err == nil {
			resp.Body.Close()
			return stdin, nil
		}
		text, _ := os.ReadFile(dir + "/log")
		if bytes.Contains(text, []byte(unix.EADDRINUSE.Error())) {
			stdin.Close()
			return nil, unix.EADDRINUSE
		}
		if time.Now().After(deadline) {
			stdin.Close()
			return nil, fmt.Errorf("%s does not answer: %w\n%s", program, err, text)
		}
	}
}

// cmd returns a command that runs a bash script with -euo pipefail in the place. args are $0, $1, ….
func (p *place) cmd(script string, args ...string) *exec.Cmd {
	line := append([]string{"bash", "-euo", "pipefail", "-c", script}, args...)
	if p.before != "" {
		line = append([]string{"unshare", "--mount", "sh", "-c", p.before + ` && exec "$0" "$@"`}, line...)
	}
	c := exec.Command(line[0], line[1:]...)
	c.Dir, c.Env = p.dir, p.Vars
	return c
}

// noHybrid hides the second cgroup tree from crun, which does not work if there are two.
const noHybrid = "{ ! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified; }"

// noRuntime hides the programs that run containers.
const noRuntime = `for f in $(which -a runc crun); do mount --bind /dev/null "$f" || exit; done`

// sh runs a script, which must succeed, and returns its output without the last newline.
func (p *place) sh(script string, args ...string) string {
	p.t.Helper()
	var out, errs bytes.Buffer
	c := p.cmd(script, args...)
	c.Stdout, c.Stderr = &out, &errs
	if err := fixture.Run(c); err != nil {
		p.t.Fatalf("%s %q: %v\n%s%s", script, args, err, out.Bytes(), errs.Bytes())
	}
	return strings.TrimSuffix(out.String(), "\n")
}

// fails runs a script that must end with the status. It must print one line to standard error, which begins with the
// command's name, and nothing to standard output.
func (p *place) fails(status int, name, script string, args ...string) string {
	p.t.Helper()
	var out, errs bytes.Buffer
	c := p.cmd(script, args...)
	c.Stdout, c.Stderr = &out, &errs
	err := fixture.Run(c)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	if got := c.ProcessState.ExitCode(); got != status {
		p.t.Errorf("%s: status %d, not %d", script, got, status)
	}
	text := errs.String()
	if !strings.HasPrefix(text, name+": ") || strings.Count(text, "\n") != 1 {
		p.t.Errorf("%s: not one line of %s: %q", script, name, text)
	}
	if out.Len() > 0 {
		p.t.Errorf("%s: printed %q", script, out.Bytes())
	}
	return text
}

// sound checks that every blob of the store has its digest.
func (p *place) sound() {
	p.t.Helper()
	p.sh(`cd .content/blobs/sha256 && find . -type f -printf '%f  %f\n' | sha256sum --check --quiet`)
}

func TestPull(t *testing.T) {
	p := here(t)
	first := p.sh("dist-pull " + image)
	if !strings.HasPrefix(first, image+"\tsha256:") {
		t.Errorf("it printed %q", first)
	}
	p.sound()
	pulled := p.Stats()
	if pulled["blobs"].Get != 4 || pulled["blobs"].Bytes < 20<<20 {
		t.Errorf("an image of one config and three layers took %+v", pulled)
	}
	p.Reset()
	if again := p.sh("dist-pull " + image); again != first {
		t.Errorf("again: %q, not %q", again, first)
	}
	if s := p.Stats(); s["blobs"].Get != 0 || s["manifests"].Bytes != 0 {
		t.Errorf("the second pull moved data: %+v", s)
	}
}

// TestPullKilled kills the pull with all its processes, as a power failure does, and pulls again.
func TestPullKilled(t *testing.T) {
	p := here(t)
	p.Add(faults.Fault{Kind: "drip", Arg: "8000000", Path: "/blobs/"})
	c := p.cmd("exec dist-pull " + image)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); p.got() < 10<<20; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no 10 MiB of ingests within a minute")
		}
	}
	if err := unix.Kill(-c.Process.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait()
	if names := p.sh("dist-image ls -q"); names != "" {
		t.Errorf("half an image has a name: %s", names)
	}
	had := p.got()
	if had < 10<<20 {
		t.Errorf("%d bytes are left of more than 10 MiB", had)
	}
	p.Clear()
	p.Reset()
	p.sh("dist-pull " + image)
	p.sound()
	total := p.layers()
	if moved := p.Stats()["blobs"].Bytes; moved > total-had+1<<20 {
		t.Errorf("the second pull moved %d bytes of %d, though %d were here", moved, total, had)
	}
	if left := p.sh("dist-active"); left != "" {
		t.Errorf("ingests are left: %s", left)
	}
}

// got returns the number of bytes in unfinished ingests.
func (p *place) got() int64 {
	var sum int64
	files, _ := filepath.Glob(filepath.Join(p.dir, ".content/ingest/*/data"))
	for _, f := range files {
		if info, err := os.Stat(f); err == nil {
			sum += info.Size()
		}
	}
	return sum
}

// layers returns the total size of the image's layers.
func (p *place) layers() int64 {
	p.t.Helper()
	var sum int64
	lines := bufio.NewScanner(strings.NewReader(p.sh("dist-image layers " + image + " | cut -f2")))
	for lines.Scan() {
		var n int64
		if _, err := fmt.Sscan(lines.Text(), &n); err != nil {
			p.t.Fatal(err)
		}
		sum += n
	}
	return sum
}

// tree lists a directory: names, kinds, modes, owners, times, links, contents.
const tree = `cd -- "$0" && find . -mindepth 1 -printf '%p %y %m %U:%G %l\n' | LC_ALL=C sort &&
	find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum &&
	find . -mindepth 1 -type f -printf '%p %Ts %s %n\n' | LC_ALL=C sort`

func TestUnpack(t *testing.T) {
	p := here(t)
	p.sh("dist-pull " + single)
	var foreign string
	t.Run("umoci", func(t *testing.T) {
		fixture.Need(t, "umoci")
		p.sh("umoci unpack --image .content:" + single + " bundle")
		foreign = p.sh(tree, "bundle/rootfs")
	})
	for _, driver := range []string{"overlayfs", "native"} {
		t.Run(driver, func(t *testing.T) {
			if driver == "overlayfs" {
				fixture.Need(t, "overlay")
			}
			q := *p
			q.t = t
			q.Vars = append(append([]string(nil), p.Vars...), "CONTAINERD_SNAPSHOTTER="+driver)
			chain := q.sh("dist-unpack " + single)
			if want := q.sh("dist-image layers " + single + " | tail -n1 | cut -f5"); chain != want {
				t.Errorf("the chain ID is %q, not %q", chain, want)
			}
			if again := q.sh("dist-unpack " + single); again != chain {
				t.Errorf("again: %q", again)
			}
			q.sh(`mkdir -p view && snap view look "$0" >/dev/null && snap mount look view`, chain)
			ours := q.sh(tree, "view")
			q.sh(`snap umount view && snap rm look`)
			if strings.Count(ours, "\n") < 1000 {
				t.Errorf("a Debian of %d lines", strings.Count(ours, "\n"))
			}
			if foreign != "" && ours != foreign {
				t.Errorf("the tree differs from umoci's:\n%s", difference(foreign, ours))
			}
		})
	}
}

// TestUnpackAsUser pulls and unpacks as user 1000, who has subordinate IDs. The tree in the user namespace is the same
// as the one that root gets.
func TestUnpackAsUser(t *testing.T) {
	p := here(t)
	fixture.Need(t, "newuidmap,userns,umoci,overlay")
	p.sh("dist-pull --root roots " + single)
	p.sh("umoci unpack --image roots:" + single + " bundle")
	want := p.sh(tree, "bundle/rootfs")
	p.before = p.mapped()
	p.Vars = append(p.Vars, "HOME="+p.dir, "XDG_RUNTIME_DIR="+p.dir)
	user := func(script string, args ...string) string {
		t.Helper()
		return p.sh(`exec setpriv --reuid 1000 --regid 1000 --clear-groups -- bash -euo pipefail -c "$0" "$@"`, append([]string{script}, args...)...)
	}
	for _, driver := range []string{"overlayfs", "native"} {
		t.Run(driver, func(t *testing.T) {
			p.t = t
			pulled := strings.Split(user("export CONTAINERD_SNAPSHOTTER="+driver+"; dist-pull --unpack "+single), "\t")
			if len(pulled) != 3 {
				t.Fatalf("it printed %q", pulled)
			}
			ours := user(`export CONTAINERD_SNAPSHOTTER=`+driver+`; mkdir -p view; exec dist-userns -- bash -c '
				snap view --mount view look "$1" >/dev/null; eval "$0"; cd ..; snap rm --umount look' "$0" "$1"`,
				strings.ReplaceAll(tree, `"$0"`, "view"), pulled[2])
			if ours != want {
				t.Errorf("the tree differs from root's:\n%s", difference(want, ours))
			}
		})
	}
}

// difference returns the first lines that only one of two texts has.
func difference(a, b string) string {
	var out strings.Builder
	for sign, pair := range map[string][2]string{"-": {a, b}, "+": {b, a}} {
		has := map[string]bool{}
		for line := range strings.Lines(pair[1]) {
			has[strings.TrimSpace(line)] = true
		}
		n := 0
		for line := range strings.Lines(pair[0]) {
			if line = strings.TrimSpace(line); !has[line] && n < 10 {
				fmt.Fprintf(&out, "%s %s\n", sign, line)
				n++
			}
		}
	}
	return out.String()
}

// TestForeignReaders reads the store in place with other projects' programs.
func TestForeignReaders(t *testing.T) {
	p := here(t)
	fixture.Need(t, "umoci")
	p.sh("dist-pull " + image)
	p.sh("dist-pull " + single)
	for _, name := range []string{image, single} {
		if got := p.sh("skopeo inspect oci:.content:" + name); !strings.Contains(got, "REDIS_VERSION=") {
			t.Errorf("skopeo inspect %s: %s", name, got)
		}
	}
	if got := p.sh("umoci ls --layout .content | sort"); got != image+"\n"+single {
		t.Errorf("umoci ls: %q", got)
	}
	p.sh("skopeo copy oci:.content:" + image + " dir:copy")
	p.sh("umoci stat --image .content:" + single)
	p.sound()
}

// TestForeignReadersBesideWriters reads a store with other projects' programs while distkit's commands write to it. The
// programs read by name if they support names in layouts that are references, or else by digest.
func TestForeignReadersBesideWriters(t *testing.T) {
	p := here(t)
	fixture.Need(t, "umoci,oras,regctl")
	manifest := strings.Fields(p.sh("dist-pull --quiet " + single))[0]
	config := p.sh("dist-image config " + single + " | sha256sum | cut -d' ' -f1")
	p.write("busy.sh", `
touch busy
loop() { while [[ -e busy ]]; do "$@" >>writers 2>&1 || echo "FAILED: $*" >>writers; done; }
ingest() { local n=$RANDOM; head -c $n /dev/zero | dist-ingest "loose$n"; }
name() {
	local n=$((RANDOM % 50))
	{ dist-image create "busy:$n" `+manifest+` || test $? = 7; } &&
		{ dist-image label "busy:$n" "at=$RANDOM" || test $? = 3; } &&
		{ dist-image rm "busy:$((RANDOM % 50))" || test $? = 3; }
}
label() { dist-label `+manifest+` "at=$RANDOM"; }
sweep() { dist-gc --grace 0; }
pull() { dist-pull -q `+image+` && dist-image rm `+image+`; }
for f in ingest name name label sweep pull; do loop $f & done
wait
`)
	writers := p.cmd("bash busy.sh")
	if err := writers.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if writers.ProcessState == nil {
			_ = os.Remove(filepath.Join(p.dir, "busy"))
			_ = writers.Wait()
		}
	}()
	p.sh("until [[ -e busy ]]; do sleep 0.01; done")
	for round := range 8 {
		for reader, want := range map[string]string{
			"skopeo inspect oci:.content:" + single:                                                                      "REDIS_VERSION=",
			"skopeo copy --quiet oci:.content:" + single + " dir:copy && skopeo inspect dir:copy":                        "REDIS_VERSION=",
			"umoci stat --image .content:" + single:                                                                      "LAYER",
			"umoci ls --layout .content":                                                                                 single,
			"oras manifest fetch --oci-layout .content@" + manifest:                                                      config,
			"oras blob fetch --oci-layout --output - .content@sha256:" + config:                                          "REDIS_VERSION=",
			"regctl manifest get --format raw-body ocidir://.content@" + manifest:                                        config,
			"regctl blob get ocidir://.content sha256:" + config:                                                         "REDIS_VERSION=",
			"rm -rf copied && oras cp --from-oci-layout .content@" + manifest + " --to-oci-layout copied:x && ls copied": "index.json",
		} {
			if got := p.sh(reader); !strings.Contains(got, want) {
				t.Errorf("round %d: %s: %s", round, reader, got)
			}
		}
	}
	if err := os.Remove(filepath.Join(p.dir, "busy")); err != nil {
		t.Fatal(err)
	}
	if err := writers.Wait(); err != nil {
		t.Errorf("writers: %v", err)
	}
	p.sh("! grep FAILED writers")
	if n := p.sh("grep -c ^sha256: writers"); len(n) < 2 {
		t.Errorf("the writers were not busy: %s lines", n)
	}
	p.sound()
}

// TestLayoutOfSkopeoIsAStore uses a layout that skopeo wrote, unchanged.
func TestLayoutOfSkopeoIsAStore(t *testing.T) {
	p := here(t)
	fixture.Need(t, "umoci")
	p.sh("dist-pull " + single + " && skopeo copy --quiet oci:.content:" + single + " oci:theirs:theirs:1 && cp -a theirs pristine")
	p.sh("export DIST_ROOT=theirs; dist-verify && dist-image check theirs:1 && dist-image ls -q | grep -x theirs:1")
	p.sh("export DIST_ROOT=theirs; dist-image manifest theirs:1 | dist-image create ours:1 -")
	p.sh("export DIST_ROOT=theirs; dist-gc --grace 0 && dist-pull " + image + " && dist-unpack ours:1")
	for _, name := range []string{"theirs:1", "ours:1"} {
		if got := p.sh("skopeo inspect oci:theirs:" + name); !strings.Contains(got, "REDIS_VERSION=") {
			t.Errorf("skopeo inspect %s: %s", name, got)
		}
	}
	p.sh("for blob in pristine/blobs/sha256/*; do cmp $blob theirs/blobs/sha256/${blob##*/}; done")
}

// TestRun runs Debian's redis in a container, with each runtime and driver, and gets its response PONG.
func TestRun(t *testing.T) {
	for _, runtime := range []string{"runc", "crun"} {
		for _, driver := range []string{"overlayfs", "native"} {
			t.Run(runtime+"/"+driver, func(t *testing.T) {
				fixture.Need(t, runtime)
				if driver == "overlayfs" {
					fixture.Need(t, "overlay")
				}
				p := here(t)
				p.Vars = append(p.Vars, "CONTAINERD_SNAPSHOTTER="+driver, "RUNTIME="+runtime)
				if runtime == "crun" {
					p.before = noHybrid
				}
				p.run(t)
				if left := p.sh("snap ls | grep Active || true; { [[ ! -e .content/containers ]] || find .content/containers -mindepth 2 -maxdepth 2; }"); left != "" {
					t.Errorf("left behind:\n%s", left)
				}
			})
		}
	}
}

func (p *place) run(t *testing.T) {
	if got := p.sh("dist-run --rm --runtime $RUNTIME " + image + " sh -c 'id -un; pwd; echo $REDIS_VERSION'"); !strings.HasPrefix(got, "redis\n/data\n7") {
		t.Errorf("the container says %q", got)
	}
	p.fails(37, "sh", "dist-run --rm --runtime $RUNTIME "+image+" sh -c 'echo sh: out >&2; exit 37'")

	// The image's own command, with a socket in a directory that a second container mounts, too.
	p.sh("mkdir -m 1777 socket")
	const shared = `--rm --runtime $RUNTIME --mount "type=bind,src=$PWD/socket,dst=/run/redis" `
	var log bytes.Buffer
	server := p.cmd(`exec dist-run --id "$0" `+shared+image+` redis-server --save '' --unixsocket /run/redis/s --unixsocketperm 777`,
		fmt.Sprintf("redis-%d", os.Getpid()))
	server.Stdout, server.Stderr = &log, &log
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	defer func() {
		_ = server.Process.Signal(unix.SIGTERM)
	}()
	for _, err := os.Stat(p.dir + "/socket/s"); err != nil; _, err = os.Stat(p.dir + "/socket/s") {
		select {
		case err := <-ended:
			t.Fatalf("the server ended: %v\n%s", err, &log)
		case <-time.After(20 * time.Millisecond):
		}
	}
	if got := p.sh("dist-run " + shared + image + " redis-cli -s /run/redis/s ping"); got != "PONG" {
		t.Errorf("redis answers %q", got)
	}
	p.sh("dist-run " + shared + image + " redis-cli -s /run/redis/s set key 'a value'")
	if got := p.sh("dist-run " + shared + image + " redis-cli -s /run/redis/s get key"); got != "a value" {
		t.Errorf("redis has %q", got)
	}
	if err := server.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("after TERM: %v\n%s", err, &log)
	}
	if !strings.Contains(log.String(), "ready to exit") {
		t.Errorf("redis did not say goodbye: %s", &log)
	}
}

// TestBadInput checks that each bad input leads to one clear line and the exit status of its class, and that nothing is
// lost.
func TestBadInput(t *testing.T) {
	p := here(t)
	p.sh("dist-pull " + single)
	p.sh("dist-fetch docker.io/library/redis single > manifest; jq -r '.layers[2].digest' manifest > digest")
	before := p.sh("dist-list -q | sort; dist-image ls")
	const none = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
	for _, tt := range []struct {
		name    string
		needs   string
		fault   string
		before  string
		status  int
		command string
		script  string
		clean   string
	}{
		{name: "locator without a host", status: 2, command: "dist-fetch", script: "dist-fetch redis latest"},
		{name: "locator without a host, resolved", status: 2, command: "dist-resolve", script: "dist-resolve redis latest"},
		{name: "unknown tag", status: 3, command: "dist-copy-graph", script: "dist-pull docker.io/library/redis:none"},
		{name: "unknown repository", status: 3, command: "dist-fetch", script: "dist-fetch docker.io/library/none latest"},
		{name: "registry down", status: 6, command: "dist-copy-graph", script: "dist-pull 127.0.0.1:1/redis:latest"},
		{name: "short body", fault: "short=100 path=/blobs/", status: 4, command: "dist-fetch", script: `dist-fetch docker.io/library/redis "$(cat digest)" >out`},
		{name: "short body into the store", fault: "short=100 path=/blobs/", status: 4, command: "dist-ingest",
			script: `set +o pipefail; dist-fetch docker.io/library/redis "$(cat digest)" 2>err | dist-ingest --root other --expected-digest "$(cat digest)" ref`},
		{name: "wrong digest", status: 4, command: "dist-ingest", script: "echo hello | dist-ingest --expected-digest " + none + " ref"},
		{name: "wrong bytes", fault: "wrong-bytes path=/blobs/", status: 4, command: "dist-fetch", script: `dist-fetch docker.io/library/redis "$(cat digest)" >out`},
		{name: "full disk", needs: "tmpfs", status: 1, command: "dist-ingest",
			script: "mkdir -p small && mount -t tmpfs -o size=1m none small && head -c 3000000 /dev/zero | dist-ingest --root small/c ref", clean: "umount small"},
		{name: "unwritable store", status: 9, command: "dist-ingest",
			script: "echo hello | setpriv --reuid 65534 --regid 65534 --clear-groups dist-ingest ref"},
		{name: "HTML instead of a manifest", fault: "html path=/manifests/", status: 4, command: "dist-copy-graph", script: "dist-pull " + image},
		{name: "unknown platform", status: 3, command: "dist-copy-graph", script: "dist-pull --platform plan9/mips " + image},
		{name: "bundle without config.json", status: 125, command: "run", script: "mkdir -p bundle && run bundle"},
		{name: "no runc", before: noRuntime, status: 125, command: "run",
			script: "mkdir -p ok/rootfs && echo '{\"config\":{\"Cmd\":[\"/true\"]}}' | run-spec >ok/config.json && run ok"},
		{name: "no such command", needs: "runc", status: 127, command: "run", script: "run ok"},
		{name: "unknown runtime", status: 125, command: "run", script: "run --runtime no-such-runtime ok"},
	} {
		t.Run(strings.ReplaceAll(tt.name, " ", "_"), func(t *testing.T) {
			fixture.Need(t, tt.needs)
			q := *p
			q.t, q.before = t, tt.before
			if tt.fault != "" {
				f, err := faults.Parse(tt.fault)
				if err != nil {
					t.Fatal(err)
				}
				q.Add(f)
				defer q.Clear()
			}
			t.Log(strings.TrimSpace(q.fails(tt.status, tt.command, tt.script)))
			if tt.clean != "" {
				q.sh(tt.clean)
			}
			after := q.sh("dist-list -q | sort; dist-image ls")
			for line := range strings.Lines(before) {
				if !strings.Contains(after, strings.TrimSpace(line)) {
					t.Errorf("the store has lost %s", line)
				}
			}
			q.sound()
			if left := q.sh("dist-active"); left != "" {
				t.Errorf("ingests are left: %s", left)
			}
		})
	}
	t.Run("id_in_use", func(t *testing.T) {
		fixture.Need(t, "runc")
		q := *p
		q.t = t
		id := fmt.Sprintf("used-%d", os.Getpid())
		first := q.cmd(`exec dist-run --rm --id "$0" `+single+` sh -c 'trap "exit 0" TERM; echo started; while :; do sleep 1; done'`, id)
		out, err := first.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := first.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "started\n" {
			t.Errorf("the first container: %q %v", line, err)
		}
		t.Log(strings.TrimSpace(q.fails(125, "dist-run", `dist-run --rm --id "$0" `+single+` true`, id)))
		_ = first.Process.Signal(unix.SIGTERM)
		if _, err := io.Copy(io.Discard, out); err != nil {
			t.Error(err)
		}
		if err := first.Wait(); err != nil {
			t.Errorf("the first container ended with %v", err)
		}
	})
}
