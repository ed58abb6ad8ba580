// Package stores tests commands on stores that are locked, read-only, owned by another user, shared by a group, named
// by a namespace's directory, or damaged.
package stores

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"distkit/testdata/fixture"
)

func TestMain(m *testing.M) { fixture.Main(m) }

// template makes a store with an image of one layer, a namespace, snapshots and a corrupt blob. Their digests are in
// the file ids.
const template = `
mkdir -p home tmp run layer
echo one > layer/a
tar --sort=name --mtime=@0 -C layer -cf layer.tar .
gzip -n < layer.tar > layer.tar.gz
layer=$(dist-ingest -q l < layer.tar.gz)
diff=sha256:$(sha256sum < layer.tar | cut -d' ' -f1)
printf '{"architecture":"%s","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":["%s"]}}\n' "$(go env GOARCH)" $diff > config
config=$(dist-ingest -q c < config)
t=application/vnd.oci.image
printf '{"schemaVersion":2,"mediaType":"%s.manifest.v1+json","config":{"mediaType":"%s.config.v1+json","digest":"%s","size":%d},"layers":[{"mediaType":"%s.layer.v1.tar+gzip","digest":"%s","size":%d}]}' \
	$t $t $config $(wc -c < config) $t $layer $(wc -c < layer.tar.gz) > manifest
manifest=$(dist-ingest -q m < manifest)
dist-image create example.org/x:1 $manifest
dist-namespace create ci a=b
ci=$(jq -c '.annotations.a = "b"' manifest | dist-ingest -q m2)
dist-image --namespace ci create example.org/ci:1 $ci
dist-label $layer team=core > label
snap --snapshotter native prepare k > mounts
snap --snapshotter native commit base k
loose=$(echo loose | dist-ingest -q loose)
corrupt=$(echo corrupt | dist-ingest -q corrupt)
p=$(dist-path -n $corrupt); chmod u+w $p; echo x > $p; chmod 444 $p
dist-export example.org/x:1 > image.tar
printf '%s\n' layer=$layer config=$config manifest=$manifest ci=$ci loose=$loose corrupt=$corrupt diff=$diff > ids
rm label mounts
`

// place is a directory that has a store which template made.
type place struct {
	dir string
	ids map[string]string
}

func newPlace(t *testing.T) *place {
	t.Helper()
	fixture.Need(t, "jq")
	p := &place{dir: fixture.TempDir(t, fixture.Dir, "store")}
	p.script(t, template)
	p.ids = fixture.Pairs(t, filepath.Join(p.dir, "ids"))
	return p
}

func (p *place) env() []string {
	return append(os.Environ(), "HOME="+p.dir+"/home", "TMPDIR="+p.dir+"/tmp", "XDG_RUNTIME_DIR="+p.dir+"/run", "DIST_STATE="+p.dir+"/run/distkit",
		"DOCKER_CONFIG="+p.dir+"/home/.docker", "LC_ALL=C", "CONTAINERD_SNAPSHOTTER=native")
}

// script runs a bash script, which must succeed, and returns its output.
func (p *place) script(t *testing.T, text string) string {
	t.Helper()
	c := exec.Command("bash", "-euo", "pipefail", "-c", text)
	c.Dir, c.Env = p.dir, p.env()
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s%s", text, err, out, errs.String())
	}
	return string(out)
}

// command returns a command of words, in which $NAME is a digest in ids.
func (p *place) command(words string) *exec.Cmd {
	args := strings.Fields(os.Expand(words, func(name string) string { return p.ids[name] }))
	c := exec.Command(args[0], args[1:]...)
	c.Dir, c.Env = p.dir, p.env()
	return c
}

// locked takes a lock, as another process would.
func (p *place) locked(t *testing.T, name string, how int) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(p.dir, name), os.O_RDONLY|os.O_CREATE, 0o666)
	if err != nil && errors.Is(err, syscall.EISDIR) {
		f, err = os.Open(filepath.Join(p.dir, name))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
}

// A signal ends every wait for a lock immediately, and the command dies of that signal.
func TestSignalsEndWaits(t *testing.T) {
	fixture.Need(t, "root")
	const (
		index, ci, ns, hold, gate, config = ".content/index.json", ".content/namespaces/ci/index.json", ".content/locks/namespaces", ".content/hold", ".content/gate", "home/.docker"
		state                             = ".content/snapshots/native/state"
	)
	blob := func(p *place, name string) string {
		_, hex, _ := strings.Cut(p.ids[name], ":")
		return ".content/locks/" + hex[:2]
	}
	for _, wait := range []struct {
		command string
		lock    string // a file, or "blob NAME"
		stdin   string // a file
	}{
		{"dist-image create example.org/y:1 $manifest", index, ""},
		{"dist-image create --namespace ci example.org/y:1 $manifest", ci, ""},
		{"dist-image create --namespace new example.org/y:1 $manifest", ns, ""},
		{"dist-image update --label a=b example.org/x:1", index, ""},
		{"dist-image label example.org/x:1 a=b", index, ""},
		{"dist-image mv example.org/x:1 example.org/y:1", index, ""},
		{"dist-image mv --to-namespace ci example.org/x:1 example.org/y:1", ci, ""},
		{"dist-image rm example.org/x:1", index, ""},
		{"dist-image rm --namespace ci example.org/ci:1", ci, ""},
		{"dist-namespace create new", ns, ""},
		{"dist-namespace label ci a=b", ci, ""},
		{"dist-namespace rm ci", ns, ""},
		{"dist-namespace rm ci", ci, ""},
		{"dist-edit --config example.org/x:1 example.org/y:1 -- sed s/one/two/", index, ""},
		{"dist-import", index, "image.tar"},
		{"dist-import", gate, "image.tar"},
		{"dist-import", hold, "image.tar"},
		{"dist-put ./.content example.org/y:1", index, "manifest"},
		{"dist-put ./.content example.org/y:1", hold, "manifest"},
		{"dist-put ./.content $layer", "blob layer", "layer.tar.gz"},
		{"dist-untag ./.content example.org/x:1", index, ""},
		{"dist-label $layer a=b", "blob layer", ""},
		{"dist-delete $loose", "blob loose", ""},
		{"dist-verify --delete $corrupt", "blob corrupt", ""},
		{"dist-ingest --expected-digest $layer again", "blob layer", "layer.tar.gz"},
		{"dist-hold -- true", hold, ""},
		{"dist-hold -- true", gate, ""},
		{"dist-pull ./.content:example.org/x:1", hold, ""},
		{"snap prepare n base", state, ""},
		{"snap label base a=b", state, ""},
		{"snap rm base", state, ""},
		{"task create --snapshot s --parent base --image example.org/x:1 --digest $manifest c", hold, ""},
		{"dist-logout 127.0.0.1:1", config, ""},
	} {
		t.Run(wait.command+" "+filepath.Base(wait.lock), func(t *testing.T) {
			t.Parallel()
			p := newPlace(t)
			if err := os.Mkdir(filepath.Join(p.dir, config), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(p.dir, config, "config.json"), []byte(`{"auths":{"127.0.0.1:1":{"auth":"eDp5"}}}`), 0o600); err != nil {
				t.Fatal(err)
			}
			name, ofBlob := strings.CutPrefix(wait.lock, "blob ")
			if ofBlob {
				name = blob(p, name)
				_ = os.Mkdir(filepath.Join(p.dir, filepath.Dir(name)), 0o777)
			}
			p.locked(t, name, unix.LOCK_EX)
			for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGINT} {
				c := p.command(wait.command)
				if wait.stdin != "" {
					f, err := os.Open(filepath.Join(p.dir, wait.stdin))
					if err != nil {
						t.Fatal(err)
					}
					defer f.Close()
					c.Stdin = f
				}
				endWait(t, c, sig, func() bool { return waits(t, c.Process.Pid, filepath.Join(p.dir, name)) })
			}
		})
	}
	t.Run("dist-gc", func(t *testing.T) { // it tries to take the lock again and again
		t.Parallel()
		p := newPlace(t)
		for name, how := range map[string]int{hold: unix.LOCK_SH, index: unix.LOCK_EX, ns: unix.LOCK_SH} {
			t.Run(filepath.Base(name), func(t *testing.T) {
				p.locked(t, name, how)
				for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGINT} {
					c := p.command("dist-gc --grace 0 --wait 1h")
					path := filepath.Join(p.dir, name)
					endWait(t, c, sig, func() bool { return asks(c.Process.Pid, path) })
				}
			})
		}
	})
}

// endWait starts a command, signals it when it waits, and checks that it dies of that signal.
func endWait(t *testing.T, c *exec.Cmd, sig syscall.Signal, waits func() bool) {
	t.Helper()
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = c.Wait(); close(ended) }()
	for !waits() {
		select {
		case <-ended:
			t.Fatalf("%v does not wait: %v: %s", c.Args, c.ProcessState, out.String())
		case <-time.After(2 * time.Millisecond):
		}
	}
	// A terminal's signals go to the whole process group, and so do those of timeout(1).
	if err := syscall.Kill(-c.Process.Pid, sig); err != nil {
		t.Fatal(err)
	}
	<-ended
	ws := c.ProcessState.Sys().(syscall.WaitStatus)
	if !ws.Signaled() || ws.Signal() != sig || out.Len() > 0 {
		t.Errorf("%v, %v: %v, %q", c.Args, sig, c.ProcessState, out.String())
	}
}

// waits reports whether a process, or one of its group, waits for the lock of a file: proc_locks(5).
func waits(t *testing.T, group int, path string) bool {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/locks")
	if err != nil {
		t.Fatal(err)
	}
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(b)) {
		words := strings.Fields(line)
		if at := slices.Index(words, "->"); at >= 0 && slices.Contains(words, file) && len(words) > at+4 {
			var pid int
			if _, err := fmt.Sscan(words[at+4], &pid); err == nil {
				if of, err := unix.Getpgid(pid); err == nil && of == group {
					return true
				}
			}
		}
	}
	return false
}

// asks reports whether a process has a file open. A process that polls for the file's lock has it open at times.
func asks(pid int, path string) bool {
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return false
	}
	return slices.ContainsFunc(fds, func(e os.DirEntry) bool {
		to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name()))
		return to == path
	})
}

// copy copies the place to a new directory.
func (p *place) copy(t *testing.T) *place {
	t.Helper()
	dir := fixture.TempDir(t, fixture.Dir, "store")
	if out, err := exec.Command("cp", "-a", p.dir+"/.", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return &place{dir, p.ids}
}

// atRoot are scripts with the options $R, which is --root, and $N, which is --namespace. There is at least one for each
// command that has --root.
var atRoot = map[string]string{
	"dist-abort":            `dist-ingest $R left -- sh -c 'echo x; exit 9' 2> /dev/null || true; dist-abort $R left`,
	"dist-active":           `dist-ingest $R left -- sh -c 'echo x; exit 9' 2> /dev/null || true; dist-active $R -q`,
	"dist-cat":              `dist-cat $R $config`,
	"dist-cat NAME":         `dist-cat $R $N example.org/ci:1`,
	"dist-commit":           `dist-commit $R $N none 2>&1 || echo $?`,
	"dist-copy-graph":       `dist-copy-graph $R $N --from-root ./.content --tag example.org/g:1 $manifest; dist-image ls -q --namespace ci`,
	"dist-delete":           `dist-delete $R $loose`,
	"dist-disk":             `dist-disk $R $N --format tar example.org/ci:1 | sha256sum`,
	"dist-doctor":           `dist-doctor $R -q | grep -x store`,
	"dist-du":               `dist-du $R $N example.org/ci:1`,
	"dist-edit":             `dist-edit $R $N --config example.org/ci:1 example.org/new:1 -- jq -c '.author = "me"'`,
	"dist-events":           `dist-label $R $loose a=b; dist-events $R | jq -c 'del(.time)'`,
	"dist-export":           `dist-export $R $N example.org/ci:1 | sha256sum`,
	"dist-file":             `dist-file $R $N example.org/ci:1 a`,
	"dist-gc":               `dist-gc $R --grace 0 -q; dist-image check example.org/x:1; dist-image --namespace ci check example.org/ci:1`,
	"dist-hold":             `dist-hold $R -- sh -c 'dist-gc --grace 0 || echo $?'`,
	"dist-image chain":      `dist-image chain $R $N example.org/ci:1`,
	"dist-image check":      `dist-image check $R $N example.org/ci:1`,
	"dist-image children":   `dist-image children $R $N example.org/ci:1`,
	"dist-image config":     `dist-image config $R $N example.org/ci:1`,
	"dist-image convert":    `dist-image convert $R $N example.org/ci:1 example.org/new:1`,
	"dist-image create":     `dist-image create $R $N example.org/new:1 $manifest; dist-image --namespace ci target example.org/new:1`,
	"dist-image diff":       `dist-image diff $R $N example.org/ci:1 $manifest || echo $?`,
	"dist-image du":         `dist-image du $R $N`,
	"dist-image label":      `dist-image label $R $N example.org/ci:1 a=b`,
	"dist-image layers":     `dist-image layers $R $N example.org/ci:1`,
	"dist-image ls":         `dist-image ls $R $N -q`,
	"dist-image manifest":   `dist-image manifest $R $N example.org/ci:1`,
	"dist-image mv":         `dist-image mv $R $N example.org/ci:1 example.org/new:1; dist-image mv $R $N --to-namespace default example.org/new:1 example.org/new:2`,
	"dist-image rm":         `dist-image rm $R $N example.org/ci:1`,
	"dist-image sources":    `dist-image sources $R $N --host r.example --repository x example.org/ci:1 || true`,
	"dist-image target":     `dist-image target $R $N example.org/ci:1`,
	"dist-image tree":       `dist-image tree $R $N example.org/ci:1`,
	"dist-image update":     `dist-image update $R $N --label a=b example.org/ci:1`,
	"dist-import":           `dist-import $R $N < image.tar`,
	"dist-index":            `dist-index $R $N example.org/ci:1`,
	"dist-ingest":           `echo new | dist-ingest $R new`,
	"dist-label":            `dist-label $R $loose a=b`,
	"dist-list":             `dist-list $R -q | sort`,
	"dist-ls":               `dist-ls $R $N -R example.org/ci:1`,
	"dist-mutate":           `SOURCE_DATE_EPOCH=0 dist-mutate $R $N --user me example.org/ci:1 example.org/new:1; dist-image config $R $N example.org/new:1`,
	"dist-namespace create": `dist-namespace create $R new a=b`,
	"dist-namespace label":  `dist-namespace label $R ci`,
	"dist-namespace ls":     `dist-namespace ls $R`,
	"dist-namespace rm":     `dist-namespace create $R new; dist-namespace rm $R new`,
	"dist-path":             `dist-path $R $config`,
	"dist-pull":             `dist-pull $R $N ./.content:example.org/x:1`,
	"dist-push":             `dist-push $R $N example.org/ci:1 ./pushed:1 | sort && dist-tags ./pushed`,
	"dist-put":              `dist-put ./$ROOT example.org/put:1 < manifest > /dev/null; dist-tags ./$ROOT | grep -c put`,
	"dist-run":              `dist-run $R $N --no-such-flag 2>&1 || echo $?`,
	"dist-serve":            `printf "GET /v2/_catalog HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" | dist-serve $R $N --stdio | tail -n 1`,
	"dist-static":           `dist-static $R $N out example.org/ci:1 x:1; find out -type f | sort`,
	"dist-unpack":           `dist-unpack $R $N --snapshotter native example.org/ci:1`,
	"dist-verify":           `dist-verify $R | sort || true; dist-verify $R --names || true`,
	"run":                   `mkdir bundle; run $R $N --id c bundle 2>&1 || echo $?`,
	"snap changes":          `snap prepare $R $N k > /dev/null; snap changes $R $N k`,
	"snap commit":           `snap prepare $R $N k > /dev/null; snap commit $R $N done k; snap ls $R $N`,
	"snap diff":             `snap prepare $R $N k > /dev/null; snap diff $R $N k -- --compress none 2> /dev/null | wc -c`,
	"snap drivers":          `snap drivers $R | cut -f1 | sort`,
	"snap label":            `snap prepare $R $N k > /dev/null; snap label $R $N k a=b`,
	"snap ls":               `snap prepare $R $N k > /dev/null; snap ls $R $N; snap ls --namespace ci`,
	"snap mount":            `snap prepare $R $N k > /dev/null; mkdir m; snap mount $R $N k m; ls m; snap umount $R $N m`,
	"snap mounts":           `snap prepare $R $N k > /dev/null; snap mounts $R $N k`,
	"snap prepare":          `snap prepare $R $N k`,
	"snap rm":               `snap prepare $R $N k > /dev/null; snap rm $R $N k`,
	"snap stack":            `dist-image layers $R $N example.org/ci:1 | snap stack $R $N -- sh -c 'dist-apply "$1" < layer.tar.gz > applied' {1} {dir}; snap ls $R $N`,
	"snap stat":             `snap prepare $R $N k > /dev/null; snap stat $R $N k | cut -f1-3`,
	"snap tree":             `snap prepare $R $N k > /dev/null; snap tree $R $N`,
	"snap umount":           `snap prepare $R $N k > /dev/null; mkdir m; snap mount $R $N k m; snap umount $R $N m`,
	"snap usage":            `snap prepare $R $N k > /dev/null; snap usage $R $N k`,
	"snap view":             `snap prepare $R $N k > /dev/null; snap commit $R $N b k; snap view $R $N v b`,
	"task create":           `task create $R $N --snapshot s --image example.org/ci:1 --digest $ci c; task ls -aq --namespace ci`,
	"task info":             `task create $R $N --snapshot s c > /dev/null; task info $R $N c | jq -c 'del(.created, .owner, .seal)'`,
	"task label":            `task create $R $N --snapshot s c > /dev/null; task label $R $N c a=b`,
	"task ls":               `task create $R $N --snapshot s c > /dev/null; task ls -a $R $N | cut -f1`,
	"task rm":               `task create $R $N --snapshot s c > /dev/null; task rm $R $N c`,
	"task trust":            `task create $R $N --snapshot s c > /dev/null; task trust $R $N c`,
}

// If --root is the directory of a namespace, it means that namespace of its store: the output and effect of a command
// are the same as with the store as --root and the namespace as --namespace.
func TestNamespaceAsRoot(t *testing.T) {
	fixture.Need(t, "root,jq")
	pristine := newPlace(t)
	t.Run("all", func(t *testing.T) { everyCommandIsThere(t, pristine) })
	for name, text := range atRoot {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var outs, files [2]string
			for i, options := range []string{`ROOT=.content R="--root .content" N="--namespace ci"`, `ROOT=.content/namespaces/ci R="--root .content/namespaces/ci" N=`} {
				p := pristine.copy(t)
				out := p.script(t, ". ./ids; "+options+"\n"+text)
				outs[i] = strings.NewReplacer(p.dir, "DIR", "/namespaces/ci", "").Replace(out)
				files[i] = p.script(t, `find .content -path '*/snapshots/*/keys/*' -prune -o -printf '%P %y\n' | sort`)
			}
			// A put into a layout changes the names in the root, which belong to the default namespace.
			if name == "dist-put" {
				return
			}
			if outs[0] != outs[1] {
				t.Errorf("by the store: %q\nby the namespace: %q", outs[0], outs[1])
			}
			if files[0] != files[1] {
				t.Errorf("files by the store alone: %q, by the namespace alone: %q", without(files[0], files[1]), without(files[1], files[0]))
			}
		})
	}
}

// without returns the lines of a text that another text does not have.
func without(text, other string) (lines []string) {
	has := strings.Split(other, "\n")
	for _, line := range strings.Split(text, "\n") {
		if !slices.Contains(has, line) {
			lines = append(lines, line)
		}
	}
	return lines
}

// everyCommandIsThere checks that atRoot has every command that supports --root.
func everyCommandIsThere(t *testing.T, p *place) {
	mains, err := filepath.Glob(filepath.Join(fixture.Root, "cmd/*/main.go"))
	if err != nil {
		t.Fatal(err)
	}
	known := func(name string) bool {
		for of := range atRoot {
			if of == name || strings.HasPrefix(of, name+" ") {
				return true
			}
		}
		return false
	}
	for _, file := range append(mains, "/dist-commit/", "/dist-mutate/", "/dist-pull/", "/dist-push/", "/dist-run/", "/dist-static/", "/dist-unpack/") {
		name := filepath.Base(filepath.Dir(file))
		help := p.script(t, name+" --help")
		takes := strings.Contains(help, "--root DIR")
		_, list, verbs := strings.Cut(help, "Available Commands:\n")
		list, _, _ = strings.Cut(list, "\n\n")
		for line := range strings.Lines(list) {
			verb := name + " " + strings.Fields(line)[0]
			if !strings.HasSuffix(verb, " help") && strings.Contains(p.script(t, verb+" --help"), "--root DIR") && !known(verb) && name != "task" && name != "run-net" {
				t.Errorf("%s takes --root, and is not in the table", verb)
			}
		}
		if takes && !verbs && !known(name) {
			t.Errorf("%s takes --root, and is not in the table", name)
		}
	}
}

// reading are scripts that read a store. They succeed in a store that can't be written to, with the same output.
var reading = map[string]string{
	"dist-active":         `dist-active -q`,
	"dist-cat":            `dist-cat $layer | sha256sum`,
	"dist-cat NAME":       `dist-cat example.org/x:1`,
	"dist-disk":           `dist-disk --format tar example.org/x:1 | sha256sum`,
	"dist-du":             `dist-du example.org/x:1`,
	"dist-events":         `dist-events`,
	"dist-export":         `dist-export example.org/x:1 | sha256sum`,
	"dist-file":           `dist-file example.org/x:1 a`,
	"dist-fetch":          `dist-fetch ./.content $layer | sha256sum`,
	"dist-hold":           `dist-hold -- dist-list -q | sort`,
	"dist-image chain":    `dist-image chain example.org/x:1`,
	"dist-image check":    `dist-image check example.org/x:1`,
	"dist-image children": `dist-image children example.org/x:1`,
	"dist-image config":   `dist-image config example.org/x:1`,
	"dist-image diff":     `dist-image diff example.org/x:1 $manifest`,
	"dist-image label":    `dist-image label example.org/x:1`,
	"dist-image layers":   `dist-image layers example.org/x:1`,
	"dist-image ls":       `dist-image ls; dist-image ls --namespace ci`,
	"dist-image manifest": `dist-image manifest example.org/x:1`,
	"dist-image target":   `dist-image target example.org/x:1`,
	"dist-image tree":     `dist-image tree example.org/x:1`,
	"dist-ingest":         `dist-ingest --expected-digest $layer again < layer.tar.gz`, // the blob exists
	"dist-label":          `dist-label $layer`,
	"dist-list":           `dist-list --json | sort`,
	"dist-ls":             `dist-ls -lR example.org/x:1`,
	"dist-namespace":      `dist-namespace ls; dist-namespace label ci`,
	"dist-path":           `dist-path -n $layer`,
	"dist-pull":           `dist-pull --root $OWN/pulled ./.content:example.org/x:1; dist-image check --root $OWN/pulled ./.content:example.org/x:1`,
	"dist-push":           `dist-push example.org/x:1 $OWN/pushed:1; dist-fetch $OWN/pushed 1 | sha256sum`,
	"dist-referrers":      `dist-referrers ./.content $manifest`,
	"dist-resolve":        `dist-resolve ./.content example.org/x:1`,
	"dist-serve":          `printf "GET /v2/_catalog HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" | dist-serve --stdio | tail -n 1`,
	"dist-static":         `dist-static $OWN/tree example.org/x:1 x:1; find $OWN/tree -type f | wc -l`,
	"dist-tags":           `dist-tags ./.content`,
	"dist-unpack":         `test $(id -u) != 0 || DIST_ALTERNATES=$PWD/.content dist-unpack --root $OWN/mine --snapshotter native $manifest > $OWN/id`,
	"dist-verify":         `dist-verify | sort || true; dist-verify --names`,
	"layers to files":     `dist-image layers -q example.org/x:1 | xargs dist-cat | dist-apply $OWN/files 2> $OWN/owners | jq -c 'del(.unset)'; cat $OWN/files/a`,
}

// Commands that only read work in a store on a read-only mount, and in one of another user, whether or not anybody has
// held it before.
func TestStoresThatCanNotBeWrittenTo(t *testing.T) {
	fixture.Need(t, "root,jq,unshare,setpriv")
	p := newPlace(t)
	p.script(t, `chmod -R go+rX .; dist-image rm --namespace ci example.org/ci:1; dist-delete $(sed -n s/^corrupt=//p ids)`)
	const each = `for name in "${!scripts[@]}"; do
	OWN=$(mktemp -d); export OWN
	bash -euo pipefail -c ". ./ids; ${scripts[$name]}" > "$OWN/out" 2> "$OWN/err" || echo "status $?" >> "$OWN/out"
	sed "s|$OWN|OWN|g; s/^/$name: /" "$OWN/out" "$OWN/err"
	rm -rf "$OWN"
done | sort`
	var list strings.Builder
	list.WriteString("declare -A scripts=(\n")
	for name, text := range reading {
		fmt.Fprintf(&list, "[%q]='%s'\n", name, strings.ReplaceAll(text, "'", `'\''`))
	}
	list.WriteString(")\nexport TMPDIR=/tmp HOME=/nonexistent\n" + each)
	if err := os.WriteFile(filepath.Join(p.dir, "read.sh"), []byte(list.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	want := p.script(t, `bash -euo pipefail read.sh`)
	if strings.Contains(want, ": status ") {
		t.Fatalf("as its owner: %s", want)
	}
	for _, held := range []bool{true, false} {
		for as, text := range map[string]string{
			"mounted": `unshare --mount --propagation private bash -euo pipefail -c 'mount --bind .content .content; mount -o remount,bind,ro .content; ! touch .content/x 2> /dev/null; exec bash -euo pipefail read.sh'`,
			"another": `setpriv --reuid 65534 --regid 65534 --clear-groups bash -euo pipefail read.sh`,
		} {
			t.Run(fmt.Sprintf("%s, held %v", as, held), func(t *testing.T) {
				q := p.copy(t)
				if !held {
					q.script(t, `rm -rf .content/hold .content/gate .content/locks`)
				}
				before := q.script(t, `find .content -printf '%P %y %s %T@\n' | sort`)
				got := q.script(t, `chmod 755 .; `+text)
				if want := strings.ReplaceAll(want, p.dir, q.dir); got != want {
					t.Errorf("differs: %q, not %q", without(got, want), without(want, got))
				}
				if after := q.script(t, `find .content -printf '%P %y %s %T@\n' | sort`); after != before {
					t.Errorf("changed: %q, before %q", without(after, before), without(before, after))
				}
			})
		}
	}
}

// Two users of one group share a store. Each can change what the other has made, with umask 002, in a directory that
// belongs to the group.
func TestStoreOfAGroup(t *testing.T) {
	fixture.Need(t, "root,jq,setpriv")
	p := newPlace(t)
	p.script(t, `rm -rf .content; mkdir .content; chgrp 60100 .content; chmod 2775 .content; chmod 755 .; chmod -R go+rX ids image.tar manifest config layer.tar.gz; mkdir -m 1777 own`)
	steps := []string{
		`dist-import < image.tar`,
		`echo one | dist-ingest one; dist-image label example.org/x:1 a=b`,
		`dist-label $layer a=b`,
		`dist-label $layer c=d; dist-label $layer a=`,
		`dist-namespace create team a=b`,
		`dist-namespace label team c=d; dist-image --namespace team create example.org/y:1 $manifest`,
		`dist-image --namespace team mv example.org/y:1 example.org/z:1; dist-image mv --namespace team --to-namespace default example.org/z:1 example.org/z:1`,
		`dist-namespace rm team`,
		`dist-edit --config example.org/x:1 example.org/e:1 -- jq -c '.author = "me"'`,
		`dist-image rm example.org/e:1; dist-gc --grace 0`,
		`dist-ingest left -- sh -c 'echo part; exit 9' 2> /dev/null || true`,
		`dist-ingest left -- echo whole`,
		`dist-ingest left -- sh -c 'echo part; exit 9' 2> /dev/null || true`,
		`dist-abort left`,
		`dist-ingest --expected-digest $layer again < layer.tar.gz`,
		`dist-put ./.content example.org/p:1 < manifest`,
		`dist-untag ./.content example.org/p:1`,
		`echo two | dist-ingest two`,
		`dist-delete $(printf 'two\n' | sha256sum | sed 's/ .*//; s/^/sha256:/')`,
		`dist-hold -- dist-image check example.org/x:1`,
		`echo old | dist-ingest old; touch -d "2 days ago" .content/blobs/sha256/$(printf "old\n" | sha256sum | sed "s/ .*//")`,
		`dist-ingest --expected-digest sha256:$(printf "old\n" | sha256sum | sed "s/ .*//") old < /dev/null`, // which belongs to the other user
		`dist-gc --grace 1h; dist-path -n sha256:$(printf "old\n" | sha256sum | sed "s/ .*//")`,
		`dist-image rm - < <(dist-image ls -q)`,
		`dist-gc --grace 0; test -z "$(dist-list -q)"`,
	}
	for _, first := range []int{60101, 60102} {
		for i, step := range steps {
			user := 60101 + (first+i)%2
			text := fmt.Sprintf(`setpriv --reuid %d --regid %[1]d --groups 60100 env HOME=/nonexistent TMPDIR=$PWD/own bash -euo pipefail -c 'umask 002; . ./ids; %s'`, user, strings.ReplaceAll(step, "'", `'\''`))
			p.script(t, text)
		}
		p.script(t, `dist-verify; dist-events | jq -e .topic > own/topics; test $(wc -l < own/topics) -gt 20`)
	}
}

// If another kind of file replaces a blob's labels, the blob can be read, labelled again, deleted and swept, and the
// damage is reported.
func TestDamagedLabels(t *testing.T) {
	pristine := newPlace(t)
	const damaged, right = 4, 0
	for name, kind := range map[string]struct {
		make  string // makes $l
		label int    // exit status of dist-label
		mend  int    // exit status of dist-label --replace
	}{
		"empty":           {`: > $l`, damaged, right},
		"not JSON":        {`head -c 100 /dev/zero > $l`, damaged, right},
		"torn":            {`printf '{"a":"b"' > $l`, damaged, right},
		"two values":      {`echo '{"a":"b"}{"c":"d"}' > $l`, damaged, right},
		"an array":        {`echo '["a"]' > $l`, damaged, right},
		"a number":        {`echo '{"a":1}' > $l`, damaged, right},
		"huge":            {`{ printf '{"a":"'; head -c 2000000 /dev/zero | tr '\0' x; printf '"}\n'; } > $l`, damaged, right},
		"endless":         {`rm $l; truncate -s 1T $l`, damaged, right},
		"a directory":     {`rm $l; mkdir $l`, damaged, right},
		"a full one":      {`rm $l; mkdir $l; echo x > $l/x`, damaged, 1},
		"a FIFO":          {`rm $l; mkfifo $l`, damaged, right},
		"a symbolic link": {`rm $l; ln -s /etc/passwd $l`, damaged, right},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := pristine.copy(t)
			p.script(t, fmt.Sprintf(`. ./ids
status() { local want=$1 got=0; shift; timeout 60 "$@" > out 2> errors || got=$?; test $got = $want || { echo "$*: status $got: $(cat out errors)"; exit 1; }; }
dist-delete $corrupt > out
l=.content/labels/sha256/${layer#*:} m=.content/labels/sha256/${loose#*:}
cp $l $m
%[1]s
status %[2]d dist-label $layer
status %[2]d dist-label $layer x=y
status 0 dist-cat $layer
status 0 dist-path -q $layer
status 0 dist-image check example.org/x:1
dist-list -q > list; grep -qx $layer list; grep -qx $loose list
status 4 dist-list --json
test $(wc -l < out) = $(wc -l < list)
status 4 dist-verify
grep -q ${layer#*:} out
status 0 dist-export example.org/x:1
status 0 dist-ingest --expected-digest $layer again < layer.tar.gz
status %[3]d dist-label --replace $layer a=b
if [ %[3]d = 0 ]; then test "$(dist-label $layer)" = $'a\tb'; status 0 dist-verify; fi
# Nor does it stop the sweep of that blob or of others.
l=$m
%[1]s
status 0 dist-gc --grace 0
test "$(dist-list -q | wc -l)" = 4
loose=$(echo loose | dist-ingest -q loose)
test -e $l || { : > $l; %[1]s; }
status 0 dist-delete $loose
! dist-path -q $loose 2> errors`, kind.make, kind.label, kind.mend))
		})
	}
}
