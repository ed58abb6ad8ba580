package content_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// require skips the test if the machine lacks something. If TEST_REQUIRE, a list of words, names it, the test fails
// instead.
func require(t *testing.T, what string, err error) {
	t.Helper()
	if err == nil {
		return
	}
	if slices.Contains(strings.FieldsFunc(os.Getenv("TEST_REQUIRE"), func(r rune) bool { return r == ',' || r == ' ' }), what) {
		t.Fatalf("%s, which TEST_REQUIRE demands: %v", what, err)
	}
	t.Skipf("%s: %v", what, err)
}

// tmpfs mounts a file system of that many bytes.
func tmpfs(t *testing.T, options string) string {
	t.Helper()
	dir := t.TempDir()
	require(t, "root", unix.Mount("tmpfs", dir, "tmpfs", 0, options))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestAFullDisk(t *testing.T) {
	dir := tmpfs(t, "size=1m")
	s := open(t, filepath.Join(dir, "store"))
	small := put(t, s, []byte("small"))
	b, dgst := random(t, 2<<20)
	for range 3 {
		_, err := content.WriteBlob(t.Context(), s, "ref", bytes.NewReader(b), 0, dgst)
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("%v", err)
		}
	}
	wantBlob(t, s, small, []byte("small"))
	if _, err := s.Path(dgst); !errdefs.IsNotFound(err) {
		t.Errorf("Path: %v", err)
	}
	if st := status(t, s, "ref"); st.Offset < 512<<10 || st.Active {
		t.Errorf("kept: %+v", st)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	if _, err := content.WriteBlob(t.Context(), s, "ref", bytes.NewReader(b), 0, dgst); err != nil {
		t.Fatalf("after the disk was enlarged: %v", err)
	}
	wantBlob(t, s, dgst, b)
}

func TestAFullDiskOfInodes(t *testing.T) {
	dir := tmpfs(t, "nr_inodes=32")
	s := open(t, filepath.Join(dir, "store"))
	var err error
	for n := 0; err == nil && n < 64; n++ {
		b, dgst := random(t, 100)
		_, err = content.WriteBlob(t.Context(), s, "ref", bytes.NewReader(b), 0, dgst)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("%v", err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "nr_inodes=64"); err != nil {
		t.Fatal(err)
	}
	put(t, s, []byte("goes on"))
}

func TestAReadOnlyStore(t *testing.T) {
	dir := tmpfs(t, "size=1m")
	s := open(t, dir)
	dgst := put(t, s, []byte("x"))
	w, err := s.Writer(t.Context(), "left", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write([]byte("y"))
	_ = w.Close()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	wantBlob(t, s, dgst, []byte("x"))
	if list, err := s.ListStatuses(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := s.Writer(t.Context(), "ref", 1, dgst); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a blob that is there: %v", err)
	}
	for name, err := range map[string]error{
		"write": func() error {
			_, err := content.WriteBlob(t.Context(), s, "ref", strings.NewReader("z"), 0, "")
			return err
		}(),
		"delete": s.Delete(t.Context(), dgst),
		"abort":  s.Abort(t.Context(), "left"),
		"label": func() error {
			_, err := s.Update(t.Context(), content.Info{Digest: dgst, Labels: map[string]string{"a": "b"}})
			return err
		}(),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestWhatACommitSyncs records the system calls of a commit into a new store and checks that their order is as
// distkit-layout(5) says.
func TestWhatACommitSyncs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	root := filepath.Join(dir, "store")
	b, dgst := random(t, 1000)
	text := traced(t, root, b, string(dgst), "stored")
	ingest := filepath.Join(root, "ingest", `[0-9a-f]{64}`)
	at := 0
	in := func(dir string) string { return `\d+<` + dir + `>, ` }
	for _, step := range []string{
		`mkdirat\(.*"` + root + `", 0777\)`,
		`fsync\(\d+<` + dir + `>\)`,
		`mkdirat\(` + in(root) + `"blobs", 0777\)`,
		`fsync\(\d+<` + root + `>\)`,
		`linkat\(.*` + in(root) + `"index.json", 0\)`,
		`fsync\(\d+<` + root + `>\)`,
		`linkat\(.*` + in(root) + `"oci-layout", 0\)`,
		`fsync\(\d+<` + root + `>\)`,
		`mkdirat\(` + in(root+"/ingest") + `"[0-9a-f]{64}", 0777\)`,
		`pwrite64\(\d+<` + ingest + `/data>`,
		`fchmod\(\d+<` + ingest + `/data>, 0444\)`,
		`fsync\(\d+<` + ingest + `/data>\)`,
		`mkdirat\(` + in(root+"/blobs") + `"sha256", 0777\)`,
		`fsync\(\d+<` + root + `/blobs>\)`,
		`renameat2?\(` + in(ingest) + `"data", ` + in(root+"/blobs/sha256") + `"` + dgst.Encoded() + `"`,
		`fsync\(\d+<` + root + `/blobs/sha256>\)`,
		`unlinkat\(` + in(ingest) + `"lock"`,
	} {
		loc := regexp.MustCompile(`(?m)^\d+ +` + step + `.* = 0|^\d+ +` + step + `.* = 1000`).FindIndex(text[at:])
		if loc == nil {
			t.Fatalf("no %s after\n%s\nin\n%s", step, text[:at], text[at:])
		}
		at += loc[1]
	}
	if regexp.MustCompile(`(pwrite64|fchmod)\(\d+<` + regexp.QuoteMeta(root) + `/blobs`).Match(text) {
		t.Error("a published blob was changed")
	}
}

// traced makes another process ingest b into the store at root, checks the outcome, and returns the process's system
// calls.
func traced(t *testing.T, root string, b []byte, expected, outcome string, options ...string) []byte {
	t.Helper()
	strace, err := exec.LookPath("strace")
	require(t, "strace", err)
	dir := t.TempDir()
	file, trace := filepath.Join(dir, "blob"), filepath.Join(dir, "trace")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	c := childCommand("ingest", root, "ref", expected, file)
	c.Args = slices.Concat([]string{strace, "-f", "-y", "-o", trace, "-e", "signal=none",
		"-e", "trace=mkdir,mkdirat,link,linkat,rename,renameat,renameat2,fsync,fchmod,pwrite64,utimensat,unlinkat"}, options, c.Args)
	c.Path = strace
	out, err := c.Output()
	text, rerr := os.ReadFile(trace)
	if rerr != nil {
		require(t, "strace", errors.New("it can't trace here: "+string(out)))
	}
	if err != nil || string(out) != outcome+"\n" {
		t.Fatalf("%q, %v", out, err)
	}
	return joined(text)
}

// A caller that gets ErrAlreadyExists may rely on the blob as much as the caller that stored it. So it has to sync: the
// other may have renamed the blob and not synced it yet.
func TestABlobThatIsThereIsSynced(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	b, dgst := random(t, 1000)
	put(t, s, b)
	for expected, outcome := range map[digest.Digest]string{dgst: "exists", "": "stored"} {
		text := traced(t, s.Root(), b, string(expected), outcome)
		if !regexp.MustCompile(`fsync\(\d+<` + s.Root() + `/blobs/sha256>\) += 0`).Match(text) {
			t.Errorf("expected %q: blobs/sha256 is not synced in\n%s", expected, text)
		}
	}
}

// On a file system without hard links, files of the layout are put in place by a rename that does not replace a file.
func TestALayoutWithoutHardLinks(t *testing.T) {
	t.Parallel()
	for _, options := range [][]string{
		{"-e", "inject=linkat:error=EPERM"},
		{"-e", "inject=linkat:error=EPERM", "-e", "inject=renameat2:error=EINVAL"},
	} {
		root := filepath.Join(t.TempDir(), "store")
		b, dgst := random(t, 1000)
		text := traced(t, root, b, string(dgst), "stored", options...)
		wantBlob(t, open(t, root), dgst, b)
		for _, name := range []string{"index.json", "oci-layout"} {
			if !regexp.MustCompile(`renameat2\(.*"` + name + `", RENAME_NOREPLACE\)`).Match(text) {
				t.Errorf("%s may replace one in\n%s", name, text)
			}
			if fi, err := os.Stat(filepath.Join(root, name)); err != nil || fi.Size() == 0 {
				t.Errorf("%v, %v", fi, err)
			}
		}
		if left, err := filepath.Glob(filepath.Join(root, "ingest", "*")); err != nil || len(left) > 0 {
			t.Errorf("left: %q, %v", left, err)
		}
	}
}

// blobs/ may be a file system of its own.
func TestBlobsOnAnotherFileSystem(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	if err := s.Init(); err != nil {
		t.Fatal(err)
	}
	blobs := filepath.Join(s.Root(), "blobs")
	require(t, "root", unix.Mount("tmpfs", blobs, "tmpfs", 0, "size=16m"))
	t.Cleanup(func() {
		if err := unix.Unmount(blobs, 0); err != nil {
			t.Error(err)
		}
	})
	b, dgst := random(t, 1<<20)
	if got, err := content.WriteBlob(t.Context(), s, "ref", bytes.NewReader(b), int64(len(b)), dgst); err != nil || got != dgst {
		t.Fatal(got, err)
	}
	wantBlob(t, s, dgst, b)
	path, err := s.Path(dgst)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o444 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	// A damaged blob is replaced.
	if err := errors.Join(os.Chmod(path, 0o644), os.Truncate(path, 10)); err != nil {
		t.Fatal(err)
	}
	put(t, s, b)
	wantBlob(t, s, dgst, b)
	// A blob for which there is no space leaves nothing at its place, and can be continued later.
	large, other := random(t, 20<<20)
	if _, err := content.WriteBlob(t.Context(), s, "ref", bytes.NewReader(large), 0, other); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("more than there is room for: %v", err)
	}
	if got := files(t, blobs); !slices.Equal(got, []string{"sha256", "sha256/" + dgst.Encoded()}) {
		t.Errorf("blobs has %q", got)
	}
	if st := status(t, s, string(other)); st.Offset != int64(len(large)) {
		t.Errorf("kept: %+v", st)
	}
	if err := unix.Mount("tmpfs", blobs, "tmpfs", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	if _, err := content.WriteBlob(t.Context(), s, "ref", bytes.NewReader(large), 0, other); err != nil {
		t.Error(err)
	}
	wantBlob(t, s, other, large)
}

// joined puts calls that strace prints on two lines, because they took long, on one line each.
func joined(trace []byte) []byte {
	begun := map[string]string{}
	var out strings.Builder
	for line := range strings.Lines(string(trace)) {
		pid, rest, _ := strings.Cut(line, " ")
		if call, ok := strings.CutSuffix(line, " <unfinished ...>\n"); ok {
			begun[pid] = call
			continue
		}
		if rest = strings.TrimLeft(rest, " "); strings.HasPrefix(rest, "<... ") {
			_, end, _ := strings.Cut(rest, ">")
			line = begun[pid] + end
		}
		out.WriteString(line)
	}
	return []byte(out.String())
}
