package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/snapshottest"
)

// asSnap is the variable that makes the test binary the command, so that a shell can run it.
const asSnap = "SNAP_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asSnap) != "" {
		main()
	}
	os.Exit(m.Run())
}

// shell runs a script with snap on its PATH, and returns its standard output, standard error and status.
func shell(t *testing.T, dir, script string, env ...string) (string, string, int) {
	t.Helper()
	bin := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(exe, filepath.Join(bin, "snap")); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("bash", "-euo", "pipefail", "-c", script)
	c.Dir = dir
	c.Env = append(os.Environ(), asSnap+"=1", "PATH="+bin+":"+os.Getenv("PATH"), "DIST_ROOT=", "CONTAINERD_NAMESPACE=", "CONTAINERD_SNAPSHOTTER=")
	c.Env = append(c.Env, env...)
	var out, errs strings.Builder
	c.Stdout, c.Stderr = &out, &errs
	_ = c.Run()
	return out.String(), errs.String(), c.ProcessState.ExitCode()
}

// The page's example of a snapshot's life by hand must work as it stands there.
func TestExamplesOfThePage(t *testing.T) {
	snapshottest.Root(t)
	page, err := os.ReadFile("snap.1.md")
	if err != nil {
		t.Fatal(err)
	}
	_, examples, _ := strings.Cut(string(page), "# EXAMPLES\n")
	examples, _, _ = strings.Cut(examples, "\nAn image's layers") // that example is run by testdata/scenarios
	var script strings.Builder
	for line := range strings.Lines(examples) {
		if code, ok := strings.CutPrefix(line, "    "); ok {
			script.WriteString(code)
		}
	}
	for _, driver := range []string{"overlayfs", "native"} {
		t.Run(driver, func(t *testing.T) {
			dir := t.TempDir()
			out, errs, status := shell(t, dir, script.String(), "CONTAINERD_SNAPSHOTTER="+driver)
			if status != 0 || errs != "snap: remove base: it has children, remove them first: app\nsnap: remove again: it is mounted on "+dir+"/mnt\n" {
				t.Fatalf("status %d: %s", status, errs)
			}
			for _, want := range []string{
				"overlayfs\t", "origin\thand\n", `"labels":{"origin":"hand"}`, "two\n", "app\tbase\tCommitted\nbase\t\tCommitted\nlook\tapp\tView\n",
				"base (Committed)\n└── app (Committed)\n    └── look (View)\n", "mount -t bind -o bind,rw " + dir,
			} {
				if !strings.Contains(out, want) {
					t.Errorf("the examples don't print %q: %s", want, out)
				}
			}
			if out, _, _ := shell(t, dir, "snap ls", "CONTAINERD_SNAPSHOTTER="+driver); out != "" {
				t.Errorf("left: %s", out)
			}
		})
	}
}

// The commands that mounts prints for a shell make the same mount, and umount recognises it.
func TestMountsForTheShell(t *testing.T) {
	snapshottest.Root(t)
	for _, driver := range []string{"overlayfs", "native"} {
		dir := filepath.Join(t.TempDir(), `a, b:c\d'e`)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		out, errs, status := shell(t, dir, `
			snap prepare a >/dev/null; snap commit one a
			snap prepare a one >/dev/null; snap commit two a
			snap prepare active two >/dev/null; snap view view two >/dev/null; snap view one-layer one >/dev/null
			mkdir mnt
			for key in active view one-layer; do
				eval "$(snap mounts --target mnt "$key")"
				snap mount "$key" mnt
				touch mnt/file 2>/dev/null && echo "$key can be written to"
				snap umount mnt
				mountpoint -q mnt && echo "$key is still mounted" || true
			done`, "CONTAINERD_SNAPSHOTTER="+driver)
		if status != 0 || errs != "" || out != "active can be written to\n" {
			t.Errorf("%s: status %d, stdout %q, stderr %q", driver, status, out, errs)
		}
	}
}

// One call makes and mounts a snapshot, or does neither. One call unmounts and removes it.
func TestMountAtOnce(t *testing.T) {
	snapshottest.Root(t)
	for _, driver := range []string{"overlayfs", "native"} {
		out, errs, status := shell(t, t.TempDir(), `
			mkdir a b; trap "umount a b 2>/dev/null || true" EXIT
			snap prepare --mount a work >/dev/null; touch a/file
			snap rm work 2>&1 | grep -o 'it is mounted' || true
			snap mount work b; snap rm --umount work
			mountpoint -q a || mountpoint -q b || ls a b
			snap prepare --mount none work || test $? = 3
			snap prepare work >/dev/null; snap commit base work
			snap view --mount a look base >/dev/null
			snap rm --umount base || test $? = 8
			mountpoint a
			snap view other base >/dev/null
			snap rm --umount look 2>&1 | grep -o 'it or other, a view of the same files, is mounted on' || true
			snap rm other; snap rm --umount look base; snap ls`, "CONTAINERD_SNAPSHOTTER="+driver)
		if status != 0 || out != "it is mounted\na:\n\nb:\na is a mountpoint\nit or other, a view of the same files, is mounted on\n" || strings.Count(errs, "\n") != 2 ||
			!strings.HasPrefix(errs, "snap: mount work: no such directory: none\n") {
			t.Errorf("%s: status %d, stdout %q, stderr %q", driver, status, out, errs)
		}
	}
}

// A snapshot is removed with its descendants. A descendant that can't be removed keeps its ancestors.
func TestRemoveRecursive(t *testing.T) {
	snapshottest.Root(t)
	for _, driver := range []string{"overlayfs", "native"} {
		out, errs, status := shell(t, t.TempDir(), `
			mkdir m; trap 'umount m 2>/dev/null || true' EXIT
			make() { snap prepare t ${2-} > /dev/null; snap commit $1 t; }
			left() { snap ls -q | sed 's/:.*/:/' | tr '\n' ' '; echo; }
			chain=sha256:$(echo x | sha256sum | cut -c1-64)
			make base; make a base; make b base; make aa a; make $chain
			snap prepare --mount m work aa > /dev/null; snap view v a > /dev/null
			snap prepare child $chain > /dev/null
			snap rm -r base || test $? = 5
			left
			snap rm -r --umount base none b || test $? = 3
			left
			snap --namespace else prepare foreign $chain > /dev/null
			snap rm -r $chain || test $? = 8
			left`, "CONTAINERD_SNAPSHOTTER="+driver)
		if status != 0 || out != "a aa b base child sha256: v work \nchild sha256: \nsha256: \n" || !strings.Contains(errs, "remove work: it is mounted") ||
			!strings.Contains(errs, "stat none: no such snapshot") || !strings.Contains(errs, "foreign (namespace else)") {
			t.Errorf("%s: status %d, stdout %q, stderr %q", driver, status, out, errs)
		}
	}
}

func TestStatuses(t *testing.T) {
	for _, c := range []struct {
		script string
		status int
		says   string
	}{
		{"snap ls", 0, ""},
		{"snap rm", 0, ""},
		{"snap stat a", 3, "snap: stat a: no such snapshot\n"},
		{"snap prepare ''", 2, "snap: KEY is empty; usage: "},
		{"snap prepare a ''", 2, "snap: PARENT is empty; usage: "},
		{"snap prepare a b", 3, "snap: prepare a: parent b: no such snapshot\n"},
		{"snap commit b a", 3, "snap: commit b: a: no such snapshot\n"},
		{"snap --snapshotter zfs ls", 2, "snap: unknown snapshotter \"zfs\": one of "},
		{"snap --namespace a/b ls", 2, "snap: namespace \"a/b\": "},
		{"snap prepare --label x a", 2, "snap: label \"x\" is not KEY=VALUE\n"},
		{"snap prepare a >/dev/null; snap prepare a", 7, "snap: prepare a: "},
		{"snap prepare a >/dev/null; snap commit b a; snap prepare a b >/dev/null; snap commit b a", 7, "snap: commit b: "},
		{"snap prepare a >/dev/null; snap commit b a; snap prepare c b >/dev/null; snap rm b", 8, "snap: remove b: it has children, remove them first: c\n"},
		{"snap prepare a >/dev/null; printf 'x\\na\\n' | snap rm - || { test $? = 3; snap ls; }", 0, "snap: remove x: no such snapshot\n"},
		{"printf 'x y\\0z\\0' | snap stat -z -", 3, "snap: stat x y: no such snapshot\nsnap: stat z: no such snapshot\n"},
		{"snap prepare a >/dev/null; snap commit b a; snap mounts b", 8, "snap: mounts of b: "},
		{"mkdir d; snap umount d; snap umount none", 3, "snap: unmount none: no such directory: none\n"},
		{"snap stack -- true </dev/null", 0, ""},
		{"snap stack", 2, "snap: requires at least 1 arg"},
		{"snap stack -j 0 -- true", 2, "snap: --jobs: 0 is less than 1\n"},
		{"snap stack --parent p -- true </dev/null", 3, "snap: stack: parent p: no such snapshot\n"},
		{"echo a | snap stack -- sh -c 'exit 42'", 42, ""},
		{"echo a | snap stack -- sh -c 'kill -KILL $$'", 137, ""},
		{"echo a | snap stack -- no-such-program", 127, "snap: run \"no-such-program\": "},
		{"echo a | snap stack -- /etc/passwd", 126, "snap: run "},
		{"printf 'again\\0.\\0why\\0' > f; snap prepare a > /dev/null; snap commit --settle f b a", 10, "snap: commit b: settle a: layers are applied on their parents\n"},
		{"snap commit --settle none b a", 3, "snap: open none: "},
	} {
		out, errs, status := shell(t, t.TempDir(), c.script, "CONTAINERD_SNAPSHOTTER=native")
		if status != c.status || !strings.HasPrefix(errs, c.says) || c.says == "" && errs != "" || out != "" {
			t.Errorf("%s: status %d, not %d; stdout %q, stderr %q", c.script, status, c.status, out, errs)
		}
	}
}

// In a chain, existing snapshots are kept. If a layer fails, nothing is left of it or of those above it.
func TestStack(t *testing.T) {
	snapshottest.Root(t)
	for _, driver := range []string{"overlayfs", "native"} {
		out, errs, status := shell(t, t.TempDir(), `
			seq 3 | sed 's/.*/x y&\tlayer &/' | snap stack -- sh -c 'echo "$1" > "$2/$1"; [ -z "$0" ] || printf "directory\0.\0\0" > "$0"' {unresolved} {1} {dir}
			seq 4 | sed 's/.*/layer &/' | snap stack -j 1 -- sh -c '> "$0/new"; [ -z "$1" ] || : > "$1"' {dir} {unresolved}
			mkdir m; snap view --mount m look 'layer 4' > mounts; ls m; snap rm --umount look
			seq 3 7 | sed 's/.*/layer &/' | snap stack --parent 'layer 2' -- sh -c '[ "$0" != "layer 6" ] && { [ -z "$1" ] || : > "$1"; }' {1} {unresolved} || echo "status $?"
			snap tree`, "CONTAINERD_SNAPSHOTTER="+driver)
		want := "layer 1\nlayer 2\nlayer 3\nlayer 1\nlayer 2\nlayer 3\nlayer 4\nnew\nx y1\nx y2\nx y3\nlayer 3\nlayer 4\nlayer 5\nstatus 1\n" +
			"layer 1 (Committed)\n└── layer 2 (Committed)\n    └── layer 3 (Committed)\n        └── layer 4 (Committed)\n            └── layer 5 (Committed)\n"
		if status != 0 || errs != "" || out != want {
			t.Errorf("%s: status %d, stdout %q, stderr %q", driver, status, out, errs)
		}
	}
}

// When it gets a signal, it ends its commands with everything that they have started, and leaves nothing.
func TestStackIsStopped(t *testing.T) {
	out, errs, status := shell(t, t.TempDir(), `
		echo layer | snap stack -- sh -c 'sleep 60 & echo $! > pid.new; mv pid.new pid; wait' &
		p=$!
		until [ -e pid ]; do sleep 0.01; done
		snap ls kind==active
		kill -TERM $p
		wait $p || echo $?
		while kill -0 $(cat pid) 2> /dev/null && ! grep -q '^State:.Z' /proc/$(cat pid)/status; do sleep 0.01; done
		snap ls`, "CONTAINERD_SNAPSHOTTER=native")
	if status != 0 || out != "stack layer\t\tActive\n143\n" {
		t.Errorf("status %d, stdout %q, stderr %q", status, out, errs)
	}
}

func TestOutput(t *testing.T) {
	dir := t.TempDir()
	out, errs, status := shell(t, dir, `
		snap prepare --label x=1 --label y=2 'a&b' | tee mounts
		snap mounts 'a&b' | cmp - mounts
		snap label 'a&b' y= z=3
		snap ls -q
		snap stat --json 'a&b'
		snap usage 'a&b' | cut -f1,3`, "CONTAINERD_SNAPSHOTTER=native")
	if status != 0 {
		t.Fatalf("status %d: %s", status, errs)
	}
	lines := strings.Split(out, "\n")
	if len(lines) != 7 {
		t.Fatalf("printed %q", out)
	}
	var m []snapshot.Mount
	if err := json.Unmarshal([]byte(lines[0]), &m); err != nil || len(m) != 1 || !strings.HasPrefix(m[0].Source, dir) {
		t.Errorf("mounts are %s: %v", lines[0], err)
	}
	if got := strings.Join(lines[1:4], " "); got != "x\t1 z\t3 a&b" {
		t.Errorf("label and ls -q print %q", got)
	}
	var i snapshot.Info
	if err := json.Unmarshal([]byte(lines[4]), &i); err != nil || i.Key != "a&b" || i.Kind != snapshot.Active || i.Labels["z"] != "3" || i.Created.IsZero() {
		t.Errorf("stat --json prints %s: %v", lines[4], err)
	}
	if lines[5] != "a&b\t1" {
		t.Errorf("usage prints %q", lines[5])
	}
}

// A name appears only after the files of its snapshot are on disk.
func TestCommitSyncsFirst(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		snapshottest.Require(t, "strace", err)
	}
	for _, flag := range []string{"", "--no-sync"} {
		out, errs, status := shell(t, t.TempDir(), `
			snap prepare a >/dev/null
			strace -f -o trace -e trace=syncfs,fsync,rename,renameat,renameat2 -- snap commit `+flag+` b a
			grep -v resumed trace | grep -oE '(syncfs|fsync)|rename.*info".*info"' | grep -oE '^[a-z]+' || true`, "CONTAINERD_SNAPSHOTTER=native")
		want := "syncfs fsync rename fsync"
		if flag != "" {
			want = "rename"
		}
		// x/sys names the same call differently on each architecture
		if got := strings.Join(strings.Fields(strings.ReplaceAll(out, "renameat", "rename")), " "); status != 0 || got != want {
			t.Errorf("commit %s: calls are %q, not %q; status %d: %s", flag, got, want, status, errs)
		}
	}
}

// Layers that are ready together share one sync, before the first of their names appears. Lower layers get their names
// first.
func TestStackSyncsOnce(t *testing.T) {
	snapshottest.Root(t)
	if _, err := exec.LookPath("strace"); err != nil {
		snapshottest.Require(t, "strace", err)
	}
	out, errs, status := shell(t, t.TempDir(), `
		seq 5 | strace -f -o trace -e trace=syncfs,symlink,symlinkat,rename,renameat,renameat2 -- snap stack -- sh -c '
			[ -z "$1" ] || : > "$1"
			if [ "$0" = 1 ]; then until [ -e 2 ] && [ -e 3 ] && [ -e 4 ] && [ -e 5 ]; do sleep 0.01; done; sleep 0.3
			else : > "$0"; fi' {1} {unresolved} >/dev/null
		grep -v resumed trace | grep -oE 'syncfs|rename.*info".*/[0-9]+/info"' | sed 's/rename.*/named/' | tr '\n' ' '
		snap tree`, "CONTAINERD_SNAPSHOTTER=overlayfs")
	names := strings.TrimSpace(strings.Split(out, "1 (Committed)")[0])
	if status != 0 || names != "syncfs named named named named named" || !strings.Contains(out, "└── 5 (Committed)") {
		t.Errorf("status %d: %s\n%s", status, out, errs)
	}
}

func TestMountCommandIsQuoted(t *testing.T) {
	line, err := command(snapshot.Mount{Type: "bind", Source: "/it's $(here)", Options: []string{"bind", "rw"}}, "/a b")
	if want := `mount -t bind -o bind,rw '/it'\''s $(here)' '/a b'`; err != nil || line != want {
		t.Errorf("command is %s, not %s: %v", line, want, err)
	}
	long := snapshot.Mount{Type: "overlay", Source: "x", Options: []string{"lowerdir=" + strings.Repeat("/x", 4096)}}
	if line, err := command(long, "/m"); err == nil {
		t.Errorf("options of more than a page became %.40s…", line)
	}
}

// If reading the store's directory fails, that must not look like a store without snapshots: another driver would hide
// those.
func TestUnreadableDriver(t *testing.T) {
	snapshottest.Strace(t)
	out, errs, status := shell(t, t.TempDir(), `
		snap --snapshotter native prepare k > /dev/null; snap commit base k
		fault() { strace -f -qq -o /dev/null -P .content/snapshots/native -e trace=getdents64 -e inject=getdents64:error=EIO snap "$@"; }
		fault prepare new || echo $?
		fault prepare new base || echo $?
		fault ls || echo $?
		ls .content/snapshots; snap ls -q`)
	if want := "1\n1\n1\nnative\nbase\n"; status != 0 || out != want || strings.Count(errs, "input/output error") != 3 {
		t.Errorf("status %d, stdout %q, not %q: %s", status, out, want, errs)
	}
}

// NFS, 9p and most of FUSE do not support flags of rename.
func TestRenameWithoutFlags(t *testing.T) {
	snapshottest.Strace(t)
	out, errs, status := shell(t, t.TempDir(), `
		fault() { strace -f -qq -o /dev/null -e trace=renameat2 -e inject=renameat2:error=EINVAL snap --snapshotter native "$@"; }
		fault prepare k > /dev/null; fault commit base k; fault prepare k base > /dev/null; fault rm k; snap ls -q`)
	if status != 0 || out != "base\n" {
		t.Errorf("status %d, stdout %q: %s", status, out, errs)
	}
}

func TestDeletedWorkingDirectory(t *testing.T) {
	_, errs, status := shell(t, t.TempDir(), `mkdir d; cd d; rmdir ../d; snap prepare k`)
	if status == 0 || status == 2 || !strings.Contains(errs, "no such file or directory") {
		t.Errorf("status %d: %s", status, errs)
	}
}

// Programs in a view give nobody their owner's rights. With the flags, neither do those in an active snapshot.
func TestMountsWithoutSetUserID(t *testing.T) {
	snapshottest.Root(t)
	out, errs, status := shell(t, t.TempDir(), `
		mkdir m; snap prepare a > /dev/null; snap commit base a; snap prepare a base > /dev/null; snap view v base > /dev/null
		trap 'umount m 2> /dev/null || true' EXIT
		options() { echo $(findmnt -nro OPTIONS m | tr , '\n' | sort | sed -n -e '/^nosuid$/p' -e '/^nodev$/p' -e '/^noexec$/p'); snap umount m; }
		snap mount a m; options
		snap mount --nosuid a m; options
		snap mount --nosuid --nodev a m; options
		snap mount --noexec a m; snap mount a m; options
		snap mount a m; snap mount --noexec a m || test $? = 5; options
		snap mount v m; options
		snap mount --nosuid=false v m; options
		snap prepare --mount m --nodev b base > /dev/null; options
		snap view --mount m w base > /dev/null; options`)
	if want := "\nnosuid\nnodev nosuid\nnoexec\n\nnodev nosuid\nnodev\nnodev\nnodev nosuid\n"; status != 0 || out != want {
		t.Errorf("status %d, stdout %q, not %q: %s", status, out, want, errs)
	}
}

// In a hostile store, records may name each other as parents in a circle.
func TestFamilyInACircle(t *testing.T) {
	t.Parallel()
	var order []string
	f := byParent([]snapshot.Info{{Key: "a", Parent: "b", Kind: snapshot.Committed}, {Key: "b", Parent: "a", Kind: snapshot.Committed}, {Key: "c", Parent: "c", Kind: snapshot.Committed}})
	for _, key := range []string{"a", "c"} {
		if err := f.each(key, true, func(key string) error { order = append(order, key); return nil }); err != nil {
			t.Error(err)
		}
	}
	if got := strings.Join(order, " "); got != "a b a c c" {
		t.Errorf("in the order %s", got)
	}
}
