package main

import (
	"bytes"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"distkit/content"

	"github.com/opencontainers/go-digest"
)

// The test binary is also the command.
func TestMain(m *testing.M) {
	if os.Getenv("DIST_EDIT_TEST") != "" {
		main()
	}
	if signal.Ignored(syscall.SIGINT) {
		// Started with a shell's &, it would ignore the signal. A caught signal is reset for children.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGINT)
	}
	os.Exit(m.Run())
}

const text = `{"schemaVersion":2}`

type world struct {
	root, tmp string
	old       digest.Digest
}

func newWorld(t *testing.T, expected digest.Digest) world {
	w := world{root: filepath.Join(t.TempDir(), "store"), tmp: t.TempDir()}
	s, err := content.Open(w.root)
	if err != nil {
		t.Fatal(err)
	}
	if w.old, err = content.WriteBlob(t.Context(), s, "ref", strings.NewReader(text), 0, expected); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w world) command(editor string, args ...string) (*exec.Cmd, *bytes.Buffer, *bytes.Buffer) {
	var out, errs bytes.Buffer
	c := exec.Command(os.Args[0], args...)
	c.Env = append(os.Environ(), "DIST_EDIT_TEST=1", "DIST_ROOT="+w.root, "TMPDIR="+w.tmp, "VISUAL=", "EDITOR="+editor)
	c.Stdout, c.Stderr = &out, &errs
	return c, &out, &errs
}

// left lists the directory for temporary files.
func (w world) left(t *testing.T) []string {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(w.tmp, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	if dirs, _ := filepath.Glob(filepath.Join(w.tmp, "*")); len(left) == 0 && len(dirs) > 0 {
		return dirs
	}
	return left
}

func (w world) blobs(t *testing.T) (n int) {
	t.Helper()
	s, err := content.Open(w.root)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Digests(t.Context(), func(digest.Digest) error { n++; return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestEdit(t *testing.T) {
	const changed = "changed\n"
	for name, editor := range map[string]string{
		"in place":      `printf 'changed\n' >`,
		"by rename":     `f() { printf 'changed\n' > "$1.new" && mv "$1.new" "$1"; }; f`,
		"with words":    `sed -i -e '1s/.*/changed/' -e '$a\'`,
		"that chatters": `f() { echo hello; echo changed > "$1"; }; f`,
	} {
		for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
			w := newWorld(t, alg.FromString(text))
			c, out, errs := w.command(editor, string(w.old))
			err := c.Run()
			if want := alg.FromString(changed).String() + "\t8\n"; err != nil || out.String() != want {
				t.Errorf("%s: %v, %q, want %q; stderr %q", name, err, out, want, errs)
			}
			if n := w.blobs(t); n != 2 {
				t.Errorf("%s: %d blobs, want 2", name, n)
			}
			if left := w.left(t); left != nil {
				t.Errorf("%s: left behind: %q", name, left)
			}
		}
	}
}

func TestTheFileIsPrivateAndOneArgument(t *testing.T) {
	w := newWorld(t, "")
	w.tmp = filepath.Join(w.tmp, "with space; $(touch injected)")
	if err := os.Mkdir(w.tmp, 0o755); err != nil {
		t.Fatal(err)
	}
	c, _, errs := w.command(`f() { test $# = 1 && stat -c '%a' "$1" "${1%/*}" >&2; }; f`, "-q", string(w.old))
	c.Dir = w.tmp
	if err := c.Run(); err != nil || errs.String() != "600\n700\n" {
		t.Errorf("%v: modes %q", err, errs)
	}
	if left := w.left(t); left != nil {
		t.Errorf("left behind: %q", left)
	}
}

func TestUnchanged(t *testing.T) {
	w := newWorld(t, "")
	c, out, errs := w.command("true", string(w.old))
	if err := c.Run(); err != nil || out.String() != string(w.old)+"\t19\n" || !strings.HasSuffix(errs.String(), string(w.old)+": unchanged\n") {
		t.Errorf("%v, %q, %q", err, out, errs)
	}
	c, out, errs = w.command("true", "-q", string(w.old))
	if err := c.Run(); err != nil || out.String() != string(w.old)+"\n" || errs.Len() > 0 {
		t.Errorf("-q: %v, %q, %q", err, out, errs)
	}
	if n := w.blobs(t); n != 1 {
		t.Errorf("%d blobs, want 1", n)
	}
}

func TestFailures(t *testing.T) {
	config := `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`
	for _, f := range []struct {
		editor string
		status int
		kept   bool
		args   []string
	}{
		{`f() { echo x > "$1"; exit 3; }; f`, 1, false, nil},
		{"no-such-editor", 1, false, nil},
		{"rm", 1, true, nil},
		{"echo x >", 2, true, []string{"--validate"}},
		{"true", 2, true, []string{"--validate"}},
		{"printf '%s' '" + config + "' >", 0, false, []string{"--validate"}},
	} {
		w := newWorld(t, "")
		c, out, errs := w.command(f.editor, append(f.args, string(w.old))...)
		_ = c.Run()
		if got := c.ProcessState.ExitCode(); got != f.status || (got != 0) != (out.Len() == 0) {
			t.Errorf("%s: status %d, want %d; %q; %q", f.editor, got, f.status, out, errs)
		}
		if n := w.blobs(t); f.status != 0 && n != 1 {
			t.Errorf("%s: %d blobs, want 1", f.editor, n)
		}
		left := w.left(t)
		if kept := len(left) == 1; kept != f.kept || kept && !strings.Contains(errs.String(), left[0]) {
			t.Errorf("%s: left behind: %q; %q", f.editor, left, errs)
		}
	}
	w := newWorld(t, "")
	c, _, _ := w.command("true", string(digest.FromString("absent")))
	if _ = c.Run(); c.ProcessState.ExitCode() != 3 || w.left(t) != nil {
		t.Errorf("no such blob: %v; left %q", c.ProcessState, w.left(t))
	}
}

func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		w := newWorld(t, "")
		ready := filepath.Join(t.TempDir(), "ready")
		if err := syscall.Mkfifo(ready, 0o600); err != nil {
			t.Fatal(err)
		}
		c, out, errs := w.command(`f() { echo > '`+ready+`'; exec sleep 60; }; f`, string(w.old))
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.ReadFile(ready); err != nil {
			t.Fatal(err)
		}
		_ = c.Process.Signal(sig)
		_ = c.Wait()
		if ws := c.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != sig || out.Len() > 0 {
			t.Errorf("sent %v: %v, %q, %q", sig, c.ProcessState, out, errs)
		}
		if left := w.left(t); left != nil {
			t.Errorf("%v: left behind: %q", sig, left)
		}
	}
}

// An interrupt that the editor handles itself does not end the edit.
func TestAnInterruptIsTheEditors(t *testing.T) {
	w := newWorld(t, "")
	editor := `f() { trap 'echo interrupted > "$1"' INT; kill -INT $PPID; while ! grep -q interrupted "$1"; do :; done; }; f`
	c, out, errs := w.command(editor, string(w.old))
	if err := c.Run(); err != nil || !strings.HasPrefix(out.String(), digest.FromString("interrupted\n").String()) {
		t.Errorf("%v, %q, %q", err, out, errs)
	}
}
