package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/cmd/internal/progress"
	"distkit/content"

	"github.com/opencontainers/go-digest"
)

// The test binary is also the command.
func TestMain(m *testing.M) {
	if os.Getenv("DIST_ACTIVE_TEST") != "" {
		main()
	}
	os.Exit(m.Run())
}

func command(root string, args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], args...)
	c.Env = append(os.Environ(), "DIST_ACTIVE_TEST=1", "DIST_ROOT="+root)
	return c
}

func TestTable(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	if out, err := command(root).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("of no store: %q, %v", out, err)
	}
	s, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Writer(t.Context(), "ref", 100, digest.FromString("x"))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	_, _ = w.Write(make([]byte, 42))
	for _, state := range []string{"active", "stale"} {
		out, err := command(root).Output()
		f := strings.Split(strings.TrimSuffix(string(out), "\n"), "\t")
		if err != nil || len(f) != 6 || f[0] != "ref" || f[1] != "42" || f[2] != "100" || f[5] != state {
			t.Errorf("%q, %v; want %s", f, err, state)
		}
		for _, at := range f[3:5] {
			if _, err := time.Parse(time.RFC3339Nano, at); err != nil {
				t.Error(err)
			}
		}
		if out, err := command(root, "-q").Output(); err != nil || string(out) != "ref\n" {
			t.Errorf("%q, %v", out, err)
		}
		_ = w.Close()
	}
}

func TestWatchEndsWhenAllIsThere(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	s, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	put := func(text string) {
		t.Helper()
		if _, err := content.WriteBlob(t.Context(), s, text, strings.NewReader(text), 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	line := func(text string) string {
		return fmt.Sprintf("{\"digest\":%q,\"size\":%d}\n", digest.FromString(text), len(text))
	}
	put("there")
	c := command(root, "--watch", "-")
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(in, line("there"), line("there"), line("comes"))
	put("comes")
	in.Close()
	if err := c.Wait(); err != nil || out.Len() > 0 || errs.Len() > 0 {
		t.Errorf("%v; stdout %q, stderr %q", err, &out, &errs)
	}

	c = command(root, "--watch", "-")
	c.Stdin = strings.NewReader(fmt.Sprintf("%s\t5\tapplication/x\n%[1]s\t5\t", digest.FromString("there")))
	if out, err := c.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("lines of fields: %q, %v", out, err)
	}

	for _, bad := range []string{"nonsense\n", digest.FromString("there").String() + "\t5\n", digest.FromString("there").String() + "\tfive\tx/y\n", "sha256:x\t5\tx/y\n", `{"digest":"sha256:x"}`, "[]"} {
		c := command(root, "--watch", "-")
		c.Stdin = strings.NewReader(bad)
		if err := c.Run(); err == nil || c.ProcessState.ExitCode() != 2 {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestLookTellsStatesApart(t *testing.T) {
	s, err := content.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	o := &object{progress.Object{Size: 5}, digest.FromString("hello")}
	want := func(state progress.State, offset int64) {
		t.Helper()
		if err := o.look(s, false); err != nil || o.State != state || o.Offset != offset {
			t.Errorf("%s at %d, %v; want %s at %d", o.State, o.Offset, err, state, offset)
		}
	}
	want(progress.Waiting, 0)
	w, err := s.Writer(t.Context(), "ref", 5, o.digest)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	_, _ = w.Write([]byte("hel"))
	want(progress.Moving, 3)
	_, _ = w.Write([]byte("lo"))
	if err := w.Commit(t.Context(), 0, "", nil); err != nil {
		t.Fatal(err)
	}
	want(progress.Done, 5)
	again := &object{progress.Object{Size: 5}, o.digest}
	if err := again.look(s, true); err != nil || again.State != progress.Exists {
		t.Errorf("%s, %v", again.State, err)
	}
}
