package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"distkit/archive"
)

// run applies a layer to a new directory.
func run(t *testing.T, layer []byte, args ...string) (dir string, r archive.Result, err error) {
	t.Helper()
	in := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(in, layer, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(in)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	was := os.Stdin
	os.Stdin = f
	defer func() { os.Stdin = was }()
	var out bytes.Buffer
	dir = filepath.Join(t.TempDir(), "new")
	c := newCmd()
	c.SilenceErrors, c.SilenceUsage = true, true
	c.SetOut(&out)
	c.SetErr(&out)
	c.SetArgs(append(args, dir))
	if err = c.ExecuteContext(t.Context()); err == nil {
		err = json.NewDecoder(bytes.NewReader(out.Bytes()[bytes.IndexByte(out.Bytes(), '{'):])).Decode(&r)
	}
	return dir, r, err
}

func layer(t *testing.T, name string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Uid: 1, Gid: 1}), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A new directory has mode 0755 whatever the umask is, and is removed if nothing was written.
func TestNewDirectory(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	dir, _, err := run(t, layer(t, "f"))
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o755 {
		t.Errorf("%v: %v", fi.Mode(), err)
	}
	dir, _, err = run(t, nil)
	if !errdefs.IsDataLoss(err) {
		t.Errorf("no layer: %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
	}
}

// The result lists what could not be set.
func TestUnset(t *testing.T) {
	_, r, err := run(t, layer(t, "f"), "--uid-map", "5:5")
	if err != nil || r.Unset["owners"] != 1 {
		t.Errorf("%+v: %v", r, err)
	}
}

func TestFlags(t *testing.T) {
	for _, args := range [][]string{
		{"--uid-map", "x"}, {"--gid-map", "1:2:3:4"}, {"--max-depth", "-1"}, {"--max-bytes", "1k"},
		{"--whiteouts", "overlay", "--unresolved", filepath.Join(t.TempDir(), "u"), "--only", "a"},
	} {
		if dir, _, err := run(t, layer(t, "f"), args...); err == nil {
			t.Errorf("%q is taken", args)
		} else if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: the directory was made: %v", args, err)
		}
	}
}

// A process that can't open the lock for large windows continues without it. Any other failure is reported.
func TestTurn(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(windowLock, filepath.Join(dir, "none"))
	over, err := turn()(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	over()
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	t.Setenv(windowLock, loop)
	if _, err := turn()(t.Context()); !errors.Is(err, unix.ELOOP) {
		t.Error(err)
	}
}
