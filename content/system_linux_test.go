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
	"golang.org/x/sys/unix"
)

// require skips the test where the machine lacks something, or fails it where TEST_REQUIRE,
// a list of words, demands it.
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

// tmpfs mounts a file system of so many bytes.
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

// TestWhatACommitSyncs records the system calls of a commit into a new store and checks
// their order against distkit-layout(5).
func TestWhatACommitSyncs(t *testing.T) {
	strace, err := exec.LookPath("strace")
	require(t, "strace", err)
	dir := t.TempDir()
	root, trace := filepath.Join(dir, "store"), filepath.Join(dir, "trace")
	b, dgst := random(t, 1000)
	file := filepath.Join(dir, "blob")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	c := childCommand("ingest", root, "ref", string(dgst), file)
	c.Args = append([]string{strace, "-f", "-y", "-o", trace, "-e", "signal=none",
		"-e", "trace=mkdir,mkdirat,link,linkat,rename,renameat,renameat2,fsync,fchmod,pwrite64,utimensat,unlinkat"}, c.Args...)
	c.Path = strace
	out, err := c.Output()
	if err != nil || string(out) != "stored\n" {
		require(t, "strace", errors.New("it can't trace here: "+string(out)))
	}
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	text = joined(text)
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

// joined makes one line of each call that took long, which strace prints on two.
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
