// Package faults makes each system call of each command that writes fail in turn, and looks at what is left.
//
//	go test ./faults                       the short form: some occurrences of each call, one error each
//	go test ./faults -long -timeout 24h    all of them (make faults)
//	go test ./faults -run 'TestFaults/image_create/renameat/1/EIO' -v
//
// What holds for every point: the command ends in time, without a panic, and with a status of the table. Status 0 means that
// what the command promises is there. Any other leaves a store that is right, says why in one line, and the
// command succeeds when it is called again, after which nothing is left over that a run without a fault would not have left.
package faults

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"distkit/testdata/faults/inject"
	"distkit/testdata/faults/nfs"
	"distkit/testdata/fixture"
)

var long = flag.Bool("long", false, "every occurrence of every call, with every error")

// occurrences is how many of each call's occurrences fail in the short form: two of those by which something is changed.
func occurrences(call string) int {
	if slices.Contains([]string{"close", "fchmod", "fchmodat", "fchown", "fchownat", "getdents64", "openat", "openat2", "pread64", "read", "readlinkat"}, call) {
		return 1
	}
	return 2
}

// patience is what a command may take, which needs milliseconds.
const patience = time.Minute

func TestMain(m *testing.M) {
	nfs.Main()
	flag.Parse()
	fixture.Main(m)
}

// A scenario is a command that writes. Its scripts run in a directory that holds the template: a store .content with an image, and
// the files that [template] makes.
type scenario struct {
	needs   string
	before  string   // script: makes what the command needs
	command []string // without a shell; $NAME is a line of the file ids
	stdin   string   // file
	// promise is a script that succeeds if what status 0 promises is there. The standard output is in the file out.
	promise string
	again   []int // statuses, besides 0, of a second call where the first has done it
}

var scenarios = map[string]scenario{
	"ingest":         {command: []string{"dist-ingest", "--expected-digest", "$new", "ref"}, stdin: "new", promise: `dist-cat $new | cmp - new`},
	"ingest_unknown": {command: []string{"dist-ingest", "ref"}, stdin: "new", promise: `dist-cat $new | cmp - new`},
	"ingest_command": {command: []string{"dist-ingest", "--expected-digest", "$new", "ref", "--", "cat", "new"}, promise: `dist-cat $new | cmp - new`},
	"ingest_resume": {before: partial,
		command: []string{"dist-ingest", "--expected-digest", "$new", "ref"}, stdin: "new", promise: `dist-cat $new | cmp - new`},
	"ingest_there": {command: []string{"dist-ingest", "--expected-digest", "$layer1", "ref"}, stdin: "layer1.tar.gz", promise: `dist-cat $layer1 | cmp - layer1.tar.gz`},
	"abort": {before: partial,
		command: []string{"dist-abort", "ref"}, promise: `test -z "$(dist-active -q)"`, again: []int{3}},
	"delete": {before: `dist-ingest x < new > /dev/null; dist-label $new a=b > /dev/null`, command: []string{"dist-delete", "$new"}, promise: `! dist-path $new 2> /dev/null`, again: []int{3}},
	"label":  {command: []string{"dist-label", "$layer1", "a=b"}, promise: `test "$(dist-label $layer1)" = "a	b"`},
	"edit":   {command: []string{"dist-edit", "$config"}, promise: `d=$(cut -f1 out); dist-cat $d | jq -e '.author == "me"'; test $d != $config`},

	"image_create": {command: []string{"dist-image", "create", "example.org/new:1", "$manifest"}, again: []int{7}, promise: `test "$(dist-image target example.org/new:1 | cut -f1)" = $manifest`},
	"image_update": {before: `dist-image create example.org/new:1 $manifest`, command: []string{"dist-image", "update", "--label", "a=b", "example.org/new:1"},
		promise: `dist-image ls --json | jq -es '.[] | select(.name == "example.org/new:1") | .labels.a == "b"'`},
	"image_rm": {before: `dist-image create example.org/new:1 $manifest`, command: []string{"dist-image", "rm", "example.org/new:1"}, again: []int{3}, promise: `test "$(dist-image ls -q)" = example.org/x:1`},
	"image_mv": {command: []string{"dist-image", "mv", "example.org/x:1", "example.org/y:1"}, again: []int{3}, promise: `test "$(dist-image ls -q)" = example.org/y:1`},
	"image_mv_namespace": {before: `dist-namespace create other`, command: []string{"dist-image", "mv", "--to-namespace", "other", "example.org/x:1", "example.org/x:1"}, again: []int{3, 7},
		promise: `test "$(dist-image --namespace other ls -q)" = example.org/x:1; test -z "$(dist-image ls -q)"`},
	"image_label": {command: []string{"dist-image", "label", "example.org/x:1", "a=b"}, promise: `test "$(dist-image label example.org/x:1)" = "a	b"`},
	"image_create_namespace": {before: `dist-namespace create other`, command: []string{"dist-image", "--namespace", "other", "create", "example.org/new:1", "$manifest"}, again: []int{7},
		promise: `test "$(dist-image --namespace other ls -q)" = example.org/new:1`},
	"namespace_create": {command: []string{"dist-namespace", "create", "other", "a=b"}, again: []int{7}, promise: `test "$(dist-namespace ls -q | sort | paste -sd' ')" = "default other"; test "$(dist-namespace label other)" = "a	b"`},
	"namespace_label":  {before: `dist-namespace create other`, command: []string{"dist-namespace", "label", "other", "a=b"}, promise: `test "$(dist-namespace label other)" = "a	b"`},
	"namespace_rm":     {before: `dist-namespace create other a=b`, command: []string{"dist-namespace", "rm", "other"}, again: []int{3}, promise: `test "$(dist-namespace ls -q)" = default`},

	"put_blob": {command: []string{"dist-put", "./layout", "$new"}, stdin: "new", promise: `dist-fetch ./layout $new | cmp - new`},
	"put_manifest": {before: `for d in $config $layer1 $layer2; do dist-cat $d | dist-put ./layout $d > /dev/null; done; dist-cat $manifest > m`,
		command: []string{"dist-put", "./layout", "tag"}, stdin: "m", promise: `dist-fetch ./layout tag | cmp - m; test "$(dist-tags ./layout)" = tag`},
	"import": {before: `dist-export example.org/x:1 > tar; rm -rf .content`, command: []string{"dist-import"}, stdin: "tar", promise: `dist-image check example.org/x:1`},
	"export": {command: []string{"dist-export", "example.org/x:1"}, promise: `DIST_ROOT=copy dist-import < out > /dev/null; DIST_ROOT=copy dist-image check example.org/x:1`},
	"copy_graph": {before: referrer, command: []string{"dist-copy-graph", "--from-root", "other", "--referrers", "--tag", "example.org/g:1", "$index"},
		promise: `dist-image check example.org/g:1; test "$(dist-referrers -q ./.content $manifest)" = "$(cat r)"`},
	"copy_graph_command": {before: referrer, command: []string{"dist-copy-graph", "--from", "exec dist-fetch --batch ./other", "--tag", "example.org/g:1", "$index"},
		promise: `dist-image check example.org/g:1`},
	"verify": {before: `dist-ingest x < new > /dev/null; p=$(dist-path -n $new); chmod u+w $p; echo x >> $p; chmod u-w $p`,
		command: []string{"dist-verify", "--delete"}, promise: `! dist-path $new 2> /dev/null; test -z "$(dist-verify)"`},
	"gc": {before: `dist-ingest x < new > /dev/null; dist-image create example.org/y:1 $index; dist-image rm example.org/y:1`, command: []string{"dist-gc", "--grace", "0"},
		promise: `dist-image check example.org/x:1; ! dist-path $new 2> /dev/null; ! dist-path $index 2> /dev/null`},

	"apply":        {command: []string{"dist-apply", "--expect-diff-id", "$diff1", "root"}, stdin: "layer1.tar.gz", promise: `diff -r root layer1; test root/a -ef root/hard`},
	"apply_second": {before: `dist-apply root < layer1.tar.gz > /dev/null`, command: []string{"dist-apply", "root"}, stdin: "layer2.tar.gz", promise: `test ! -e root/a -a -e root/b`},

	"snap_prepare": {command: []string{"snap", "--snapshotter", "native", "prepare", "k", "base"}, again: []int{7}, promise: `p=$(snap mounts k | jq -r '.[0].source'); diff -r $p layer1; test "$(snap ls -q)" = "base
k"`},
	"snap_commit": {before: `snap prepare k base > /dev/null; echo x > $(snap mounts k | jq -r '.[0].source')/file`, command: []string{"snap", "commit", "done", "k"}, again: []int{3},
		promise: `snap view v done | jq -r '.[0].source' | { read -r p; test "$(cat $p/file)" = x; }; snap rm v; test "$(snap ls -q)" = "base
done"`},
	"snap_rm":     {before: `snap prepare k base > /dev/null`, command: []string{"snap", "rm", "k"}, again: []int{3}, promise: `test "$(snap ls -q)" = base`},
	"snap_label":  {command: []string{"snap", "label", "base", "a=b"}, promise: `test "$(snap label base)" = "a	b"`},
	"snap_mount":  {needs: "root", before: `snap prepare k base > /dev/null; mkdir m`, command: []string{"snap", "mount", "k", "m"}, promise: `diff -r m layer1; mountpoint -q m`},
	"snap_umount": {needs: "root", before: `snap prepare k base > /dev/null; mkdir m; snap mount k m`, command: []string{"snap", "umount", "m"}, promise: `! mountpoint -q m`},
	"overlay_prepare": {needs: "root,overlay", before: overlay, command: []string{"snap", "--snapshotter", "overlayfs", "prepare", "--mount", "m", "k", "obase"}, again: []int{7},
		promise: `test "$(cat m/file)" = x`},
	"overlay_mount": {needs: "root,overlay", before: overlay + `snap prepare k obase > /dev/null`, command: []string{"snap", "--snapshotter", "overlayfs", "mount", "k", "m"},
		promise: `test "$(cat m/file)" = x`},
	"overlay_commit": {needs: "root,overlay", before: overlay + `dist-apply --whiteouts overlay --unresolved u $(snap prepare k | jq -r '.[0].source') < layer2.tar.gz > /dev/null`,
		command: []string{"snap", "--snapshotter", "overlayfs", "commit", "--parent", "obase", "done", "k"}, again: []int{3},
		promise: `snap --snapshotter overlayfs view --mount m v done > /dev/null; test "$(cat m/b)" = two -a "$(cat m/file)" = x; snap --snapshotter overlayfs rm --umount v`},
	"overlay_umount": {needs: "root,overlay", before: overlay + `snap prepare --mount m k obase > /dev/null`, command: []string{"snap", "--snapshotter", "overlayfs", "rm", "--umount", "k"}, again: []int{3},
		promise: `! mountpoint -q m; test "$(snap --snapshotter overlayfs ls -q)" = obase`},

	"task_create": {needs: "root", command: []string{"task", "create", "--snapshotter", "native", "--snapshot", "s", "--parent", "base", "--image", "example.org/x:1", "--digest", "$manifest", "c"}, again: []int{7},
		promise: `test "$(task ls -aq)" = c; task info c | grep -q example.org/x:1; snap stat s > /dev/null`},
	"task_rm": {needs: "root", before: `task create --snapshotter native --snapshot s --parent base c > /dev/null`, command: []string{"task", "rm", "c"}, again: []int{3, 125},
		promise: `test -z "$(task ls -aq)"; ! snap stat s 2> /dev/null`},
}

const partial = `dist-ingest --expected-digest $new ref -- sh -c 'head -c 70000 new; exit 9' 2> /dev/null && exit 1; dist-active -q | grep -qx ref`

// referrer moves the store to other, and adds an artifact there that refers to the manifest.
const referrer = `mv .content other; export DIST_ROOT=other; empty=sha256:$(printf '{}' | sha256sum | cut -d' ' -f1); printf '{}' | dist-put ./other $empty; dist-image target example.org/x:1 |
	jq -Rrc --arg c $empty 'split("\t") | {schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json", artifactType: "a/b", layers: [],
		config: {mediaType: "application/vnd.oci.empty.v1+json", digest: $c, size: 2}, subject: {mediaType: .[2], digest: .[0], size: (.[1] | tonumber)}}' > m
echo sha256:$(sha256sum < m | cut -d' ' -f1) > r; dist-put ./other $(cat r) mediatype:application/vnd.oci.image.manifest.v1+json < m; rm m; `

const overlay = `mkdir m; export CONTAINERD_SNAPSHOTTER=overlayfs; echo x > $(snap prepare o | jq -r '.[0].source')/file; snap commit obase o; `

// template makes what all scenarios begin with.
const template = `
mkdir -p tmp home run layer1/d layer2
echo one > layer1/a; echo in > layer1/d/f; ln layer1/a layer1/hard; ln -s a layer1/sym
echo two > layer2/b; touch layer2/.wh.a
for n in 1 2; do
	tar --sort=name --mtime=@0 -C layer$n -cf layer$n.tar .
	gzip -n < layer$n.tar > layer$n.tar.gz
	echo "layer$n=$(dist-ingest l$n < layer$n.tar.gz | cut -f1)"
	echo "diff$n=sha256:$(sha256sum < layer$n.tar | cut -d' ' -f1)"
done > ids
. ./ids
size() { dist-list --json | jq -r "select(.digest == \"$1\").size"; }
printf '{"architecture":"%s","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":["%s","%s"]}}\n' "$(go env GOARCH)" $diff1 $diff2 > c
config=$(dist-ingest c < c | cut -f1)
t=application/vnd.oci.image
printf '{"schemaVersion":2,"mediaType":"%s.manifest.v1+json","config":{"mediaType":"%s.config.v1+json","digest":"%s","size":%d},"layers":[{"mediaType":"%s.layer.v1.tar+gzip","digest":"%s","size":%d},{"mediaType":"%s.layer.v1.tar+gzip","digest":"%s","size":%d}]}' \
	$t $t $config $(size $config) $t $layer1 $(size $layer1) $t $layer2 $(size $layer2) > m
manifest=$(dist-ingest m < m | cut -f1)
printf '{"schemaVersion":2,"mediaType":"%s.index.v1+json","manifests":[{"mediaType":"%s.manifest.v1+json","digest":"%s","size":%d}]}' $t $t $manifest $(size $manifest) > i
index=$(dist-ingest i < i | cut -f1)
dist-image create example.org/x:1 $manifest
head -c 100000 /dev/zero | tr '\0' 'n' > new
printf '%s\n' config=$config manifest=$manifest index=$index new=sha256:$(sha256sum < new | cut -d' ' -f1) >> ids
rm c m i
cp -a layer1/. "$(snap --snapshotter native prepare k | jq -r '.[0].source')"
snap commit base k
`

// errnos are the errors that a call fails with.
var errnos = []struct {
	name  string
	errno syscall.Errno
}{{"EIO", syscall.EIO}, {"ENOSPC", syscall.ENOSPC}, {"EINTR", syscall.EINTR}, {"EDQUOT", syscall.EDQUOT}}

func TestFaults(t *testing.T) {
	var points atomic.Int64
	t.Cleanup(func() { t.Logf("%d points", points.Load()) })
	everyScenario(t, fixture.Dir, func(t *testing.T, w *world) {
		for _, call := range inject.Names() {
			if w.clean.Calls[call] == 0 {
				continue
			}
			t.Run(call, func(t *testing.T) {
				came := true
				if *long { // a fault that stays ends the command too
					for _, e := range errnos {
						if e.errno == syscall.EINTR {
							continue // for which calls are made again, without end
						}
						t.Run("every/"+e.name, func(t *testing.T) { w.point(t, inject.Fault{Call: call, Error: e.errno}) })
					}
				}
				for n := 1; came && (*long || n <= min(w.clean.Calls[call], occurrences(call))); n++ {
					came = false
					for i, e := range errnos {
						if !*long && int(hash(w.name, call, fmt.Sprint(n))%uint32(len(errnos))) != i {
							continue
						}
						t.Run(fmt.Sprint(n, "/", e.name), func(t *testing.T) {
							if w.point(t, inject.Fault{Call: call, N: n, Error: e.errno}) {
								came = true
								points.Add(1)
							}
						})
					}
				}
			})
		}
	})
}

func hash(words ...string) uint32 {
	h := fnv.New32()
	_, _ = h.Write([]byte(strings.Join(words, "/")))
	return h.Sum32()
}

// A file system that lets nobody set times loses no blob: those of the write are right.
func TestNoTimes(t *testing.T) {
	fixture.Need(t, "seccomp,jq")
	dir := t.TempDir()
	if err := script(dir, template); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ingest", "ingest_resume", "ingest_there", "label", "edit"} {
		for _, errno := range []syscall.Errno{syscall.EPERM, syscall.ENOSYS} {
			t.Run(name+"/"+errno.Error(), func(t *testing.T) {
				w := begin(t, fixture.Dir, dir, name, scenarios[name])
				at := w.copy(t)
				r, err := w.run(at, inject.Fault{Call: "utimensat", Error: errno})
				if err != nil {
					t.Fatal(err)
				}
				if err := w.promised(at); err != nil || r.Status != 0 || r.Failed == "" {
					t.Errorf("status %d, %q (%s): %v", r.Status, r.Stderr, r.Failed, err)
				}
			})
		}
	}
}

// NFS locks a file exclusively only if it is open for writing. No command locks a file that is open for reading only.
func TestLocksOfNFS(t *testing.T) {
	everyScenario(t, fixture.Dir, func(t *testing.T, w *world) {
		at := w.copy(t)
		r, err := w.run(at, inject.Fault{Call: "flock", Error: syscall.EBADF, If: inject.LocksReadOnly})
		if err != nil {
			t.Fatal(err)
		}
		if r.Status != 0 || r.Failed != "" {
			t.Errorf("status %d, %q: locked exclusively, but open for reading only: %q", r.Status, r.Stderr, r.Failed)
		} else if err := w.promised(at); err != nil {
			t.Error(err)
		}
	})
}

// On a file system without locks a command changes nothing, says why and has status 10.
func TestNoLocks(t *testing.T) {
	everyScenario(t, fixture.Dir, func(t *testing.T, w *world) {
		if w.clean.Calls["flock"] == 0 {
			return // it takes no lock of the store
		}
		for _, errno := range []syscall.Errno{syscall.ENOLCK, syscall.ENOSYS, syscall.EOPNOTSUPP} {
			at := w.copy(t)
			r, err := w.run(at, inject.Fault{Call: "flock", Error: errno})
			if err != nil {
				t.Fatal(err)
			}
			if r.Status != 10 && (w.command[0] != "task" || r.Status != 125) || strings.Count(r.Stderr, "has no locks that processes share") != 1 || strings.Count(r.Stderr, "\n") != 1 {
				t.Errorf("%v: status %d, %q", errno, r.Status, r.Stderr)
			}
			if err := w.right(at); err != nil {
				t.Errorf("%v: %v", errno, err)
			}
		}
	})
}

// The scenarios hold on a mount that locks, removes and renames as NFS does, and nothing is left over.
func TestMountOfNFS(t *testing.T) {
	everyScenario(t, mountNFS(t, t.TempDir()), func(t *testing.T, w *world) {
		if left := difference(w.left, begin(t, fixture.Dir, w.template, w.name, w.scenario).left); len(left) > 0 {
			t.Errorf("left over: %q", left)
		}
	})
}

// Two clients of one server change names, blobs and labels, sweep and read at the same time: nothing is lost, and nobody fails.
func TestClientsOfNFS(t *testing.T) {
	source := t.TempDir()
	first, second := mountNFS(t, source), mountNFS(t, source)
	if err := script(first, template+"rm -r .content/snapshots\n"); err != nil {
		t.Fatal(err)
	}
	const rounds = 8
	work := func(client string) string {
		return fmt.Sprintf(`. ./ids
for n in $(seq %[2]d); do
	dist-image create example.org/%[1]s:$n $manifest
	dist-label $config %[1]s$n=x > /dev/null
	printf 'blob %%s' $n | dist-ingest --expected-digest sha256:$(printf 'blob %%s' $n | sha256sum | cut -d' ' -f1) blob$n > /dev/null
	dist-namespace create %[1]s$n
	dist-image rm example.org/%[1]s:$n
	dist-image create example.org/%[1]s:$n $manifest
	dist-namespace rm %[1]s$n
done`, client, rounds)
	}
	read := fmt.Sprintf(`. ./ids; for n in $(seq %d); do dist-image ls -q > /dev/null; dist-image check example.org/x:1; dist-cat $manifest > /dev/null; done`, 4*rounds)
	sweep := fmt.Sprintf(`for n in $(seq %d); do dist-gc --wait 60s > /dev/null; done`, rounds/2)
	failed := make(chan error, 6)
	for _, run := range []struct{ at, text string }{{first, work("a")}, {second, work("b")}, {first, read}, {second, read}, {first, sweep}, {second, sweep}} {
		go func() { failed <- script(run.at, run.text) }()
	}
	for range cap(failed) {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	err := script(second, fmt.Sprintf(`. ./ids; test "$(dist-image ls -q | grep -c 'example.org/[ab]:')" = %d; test "$(dist-label $config | wc -l)" = %[1]d
test "$(dist-namespace ls -q)" = default; dist-verify; test "$(dist-list -q | wc -l)" = %d; test -z "$(ls .content/ingest)"; ! find .content -name '.nfs*' | grep .`, 2*rounds, 5+rounds))
	if err != nil {
		t.Error(err)
	}
}

// A file that a reader has open does not keep a namespace, nor the process that removes it. A sweep removes the file's other name.
func TestRemovalOnNFSBesideAReader(t *testing.T) {
	at := mountNFS(t, t.TempDir())
	err := script(at, template+`dist-namespace create x
exec 3< .content/namespaces/x/index.json
timeout 20 dist-namespace rm x
test "$(dist-namespace ls -q)" = default
exec 3<&-
dist-gc > /dev/null
test -z "$(ls -A .content/namespaces)"
`)
	if err != nil {
		t.Error(err)
	}
}

// mountNFS shows a directory as an NFS client does, and returns the mount point.
func mountNFS(t *testing.T, source string) string {
	t.Helper()
	fixture.Need(t, "root,fuse")
	target := t.TempDir()
	unmount, err := nfs.Mount(source, target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Error(err)
		}
	})
	return target
}

// everyScenario begins each scenario in a subtest, which calls f. The directories of the runs are made in in.
func everyScenario(t *testing.T, in string, f func(t *testing.T, w *world)) {
	t.Helper()
	fixture.Need(t, "seccomp,jq")
	dir := t.TempDir()
	if err := script(dir, template); err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(scenarios)) {
		sc := scenarios[name]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fixture.Need(t, sc.needs)
			f(t, begin(t, in, dir, name, sc))
		})
	}
}

// world is what the points of one scenario share.
type world struct {
	scenario
	name     string
	in       string            // where the directories of its runs are made
	template string            // the directory each point begins with a copy of
	ids      map[string]string // of its file ids
	clean    inject.Result     // of a run without a fault
	left     []string          // the store's files after that
}

func begin(t *testing.T, in, dir, name string, sc scenario) *world {
	t.Helper()
	w := &world{scenario: sc, name: name, in: in, template: dir, ids: fixture.Pairs(t, filepath.Join(dir, "ids"))}
	at := w.copy(t)
	var err error
	if w.clean, err = w.run(at, inject.Fault{}); err != nil {
		t.Fatal(err)
	}
	if w.clean.Status != 0 {
		t.Fatalf("without a fault: status %d: %s", w.clean.Status, w.clean.Stderr)
	}
	if err := w.promised(at); err != nil {
		t.Fatalf("without a fault: %v", err)
	}
	if err := w.right(at); err != nil {
		t.Fatalf("without a fault: %v", err)
	}
	if w.left, err = files(at); err != nil {
		t.Fatal(err)
	}
	return w
}

// copy makes a directory for one run.
func (w *world) copy(t *testing.T) string {
	t.Helper()
	at := fixture.TempDir(t, w.in, w.name)
	if out, err := exec.Command("cp", "-a", "--reflink=auto", w.template+"/.", at).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := script(at, ". ./ids; "+w.before); err != nil {
		t.Fatalf("before: %v", err)
	}
	return at
}

func environment(at string) []string {
	return append(os.Environ(), "HOME="+at+"/home", "TMPDIR="+at+"/tmp", "XDG_RUNTIME_DIR="+at+"/run", "DIST_STATE="+at+"/run/distkit",
		"LC_ALL=C", "VISUAL=", "EDITOR=sed -i '1s/{/{\"author\":\"me\",/'", "TERM=xterm", "GOTRACEBACK=all")
}

func script(at, text string) error {
	c := exec.Command("bash", "-euo", "pipefail", "-c", text)
	c.Dir, c.Env = at, environment(at)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", text, err, out)
	}
	return nil
}

func (w *world) run(at string, f inject.Fault) (inject.Result, error) {
	args := slices.Clone(w.command)
	for i, a := range args {
		args[i] = os.Expand(a, func(name string) string { return w.ids[name] })
	}
	c := exec.Command(args[0], args[1:]...)
	c.Dir, c.Env = at, environment(at)
	if w.stdin != "" {
		f, err := os.Open(filepath.Join(at, w.stdin))
		if err != nil {
			return inject.Result{}, err
		}
		defer f.Close()
		c.Stdin = f
	}
	r, err := inject.Run(c, at, f, patience)
	if err == nil {
		err = os.WriteFile(filepath.Join(at, "out"), r.Stdout, 0o644)
	}
	return r, err
}

func (w *world) promised(at string) error {
	if err := script(at, ". ./ids; "+w.promise); err != nil {
		return fmt.Errorf("what was promised is not there: %w", err)
	}
	return nil
}

// durable are the calls after which what was written is on the disk.
var durable = []string{"fsync", "fdatasync", "syncfs"}

// point makes one call fail, and reports whether there was such a call.
func (w *world) point(t *testing.T, f inject.Fault) bool {
	at := w.copy(t)
	r, err := w.run(at, f)
	if err != nil {
		t.Fatal(err)
	}
	if r.Failed == "" {
		return false
	}
	failed := func(format string, args ...any) {
		t.Helper()
		t.Errorf("%s (%s) fails: status %d, %q: %s", f.Call, r.Failed, r.Status, strings.TrimSpace(r.Stderr), fmt.Sprintf(format, args...))
	}
	switch {
	case r.Stuck:
		failed("stuck")
		return true
	case r.Signal != "":
		failed("ended by %s", r.Signal)
	case r.Status > 10 && (w.command[0] != "task" || r.Status != 125):
		failed("no status of the table")
	case strings.Contains(r.Stderr, "goroutine ") || strings.Contains(r.Stderr, "panic"):
		failed("panic")
	case r.Status != 0 && (strings.Count(r.Stderr, "\n") != 1 || !strings.HasPrefix(r.Stderr, w.command[0]+": ")):
		failed("not one line")
	}
	if err := w.right(at); err != nil {
		failed("%v", err)
	}
	if r.Status == 0 {
		if f.Error != syscall.EINTR && slices.Contains(durable, f.Call) {
			failed("not durable, and success")
		}
		if err := w.promised(at); err != nil {
			failed("%v", err)
		}
	}
	if r.Status != 0 && f.Error == syscall.EINTR && f.Call != "close" {
		failed("interrupted calls are to be made again")
	}

	again, err := w.run(at, inject.Fault{})
	if err != nil {
		t.Fatal(err)
	}
	if again.Status != w.clean.Status && !slices.Contains(w.again, again.Status) {
		failed("called again: status %d, %q", again.Status, strings.TrimSpace(again.Stderr))
		return true
	}
	if err := w.promised(at); err != nil {
		failed("called again (status %d): %v", again.Status, err)
	}
	if err := rightStore(filepath.Join(at, ".content"), false); err != nil {
		failed("called again: %v", err)
	}
	left, err := w.leftOver(at, r)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		failed("called again: left over %q", left)
	}
	return true
}

// isLock reports whether a file serves only to be locked: for the sweep, the list of namespaces, or a blob that the command found when it
// was called again. Such files are never deleted.
func isLock(name string) bool {
	_, name, _ = strings.Cut(name, "/") // of the store or layout
	return name == "hold" || name == "gate" || name == "locks" || strings.HasPrefix(name, "locks/")
}

// leftOver lists the files that a run without a fault would not have left, and that the sweep does not delete either. What could
// not be deleted because that very call failed may stay, and so may what the message names.
func (w *world) leftOver(at string, r inject.Result) ([]string, error) {
	failed := plain(r.Failed)
	extra := func() ([]string, error) {
		left, err := files(at)
		if err != nil {
			return nil, err
		}
		return slices.DeleteFunc(difference(left, w.left), func(name string) bool {
			return filepath.Base(name) == filepath.Base(failed) || strings.HasPrefix(name, failed+"/") ||
				strings.Contains(r.Stderr, at+"/"+name) || isLock(name) || slices.Contains(looked, name)
		}), nil
	}
	left, err := extra()
	if err != nil || len(left) == 0 {
		return nil, err
	}
	// The next that makes or removes a snapshot sweeps their tmp/.
	err = script(at, `for d in $(ls .content/snapshots); do snap --snapshotter $d prepare sweep > /dev/null; snap --snapshotter $d rm sweep; done; dist-gc --grace 0 > /dev/null`)
	if err != nil {
		return nil, err
	}
	return extra()
}

// looked is what is left in the private state when a command has looked at containers that were there before it.
var looked = []string{"run/distkit", "run/distkit/due", "run/distkit/due/STORE", "run/distkit/due/STORE/.seen"}

func difference(a, b []string) (only []string) {
	b = slices.Clone(b)
	for _, s := range a {
		if i := slices.Index(b, s); i >= 0 {
			b = slices.Delete(b, i, i+1)
		} else {
			only = append(only, s)
		}
	}
	return only
}

var (
	number = regexp.MustCompile(`/[0-9]+(/|$)`)
	random = regexp.MustCompile(`/[0-9a-f]{64}(/|$)`)
	store  = regexp.MustCompile(`/due/[^/]*`)
)

// plain is a name without the numbers of snapshots, the hashes of keys and the identity of the store.
func plain(name string) string {
	if strings.Contains(name, "/keys/") {
		name = random.ReplaceAllString(name, "/HASH$1")
	}
	return number.ReplaceAllString(store.ReplaceAllString(name, "/due/STORE"), "/N$1")
}

// files lists the store's files, the layout's and the state's, without the numbers of snapshots.
func files(at string) ([]string, error) {
	var all []string
	for _, top := range []string{".content", "layout", "root", "run", "tmp"} {
		err := filepath.WalkDir(filepath.Join(at, top), func(path string, _ fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			all = append(all, plain(strings.TrimPrefix(path, at+"/")))
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(all)
	return all, nil
}

// right checks the invariants of a store, and of a layout that dist-put wrote, by their files alone, and then that commands can list it.
func (w *world) right(at string) error {
	for _, root := range []string{at + "/.content", at + "/layout"} {
		if err := rightStore(root, w.name == "verify"); err != nil {
			return err
		}
	}
	return script(at, "dist-image ls; dist-list; dist-active; for d in $(ls .content/snapshots); do snap --snapshotter $d ls; done; task ls -a")
}

func rightStore(root string, corrupt bool) error {
	blobs, err := filepath.Glob(root + "/blobs/sha256/*")
	if err != nil {
		return err
	}
	have := map[string]bool{}
	for _, name := range blobs {
		base := filepath.Base(name)
		if strings.HasPrefix(base, ".tmp-") {
			continue // what a layout's writer left is another point's to find
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(b)
		if hex.EncodeToString(sum[:]) != base && !corrupt {
			return fmt.Errorf("%s holds other bytes", name)
		}
		if fi, err := os.Lstat(name); err != nil || fi.Mode() != 0o444 && strings.HasSuffix(root, ".content") {
			return fmt.Errorf("%s: %v, %v", name, fi.Mode(), err)
		}
		have["sha256:"+base] = true
	}
	indexes, _ := filepath.Glob(root + "/namespaces/*/index.json")
	for _, name := range append(indexes, root+"/index.json") {
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		var index struct {
			SchemaVersion int
			Manifests     []struct{ Digest string }
		}
		if err := json.Unmarshal(b, &index); err != nil || index.SchemaVersion != 2 {
			return fmt.Errorf("%s: %v: %.100q", name, err, b)
		}
		for _, m := range index.Manifests {
			if !have[m.Digest] {
				return fmt.Errorf("%s names %s, which is not here", name, m.Digest)
			}
		}
	}
	links, _ := filepath.Glob(root + "/namespaces/*/blobs")
	for _, name := range links {
		if to, err := os.Readlink(name); err != nil || to != "../../blobs" {
			return fmt.Errorf("%s leads to %q: %v", name, to, err)
		}
	}
	records, _ := filepath.Glob(root + "/snapshots/*/[0-9]*/info")
	labels, _ := filepath.Glob(root + "/labels/*/*")
	for _, name := range append(records, labels...) {
		if b, err := os.ReadFile(name); err != nil || !json.Valid(b) {
			return fmt.Errorf("%s: %v: %.100q", name, err, b)
		}
	}
	b, err := os.ReadFile(root + "/events")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	lines := strings.Split(string(b), "\n")
	for _, line := range lines[:len(lines)-1] { // the last may be torn
		if line != "" && !json.Valid([]byte(line)) {
			return fmt.Errorf("%s/events: %.100q", root, line)
		}
	}
	return nil
}
