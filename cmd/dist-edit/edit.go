package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// edit is what one call of the command is to do.
type edit struct {
	store  *content.Store
	editor string             // a shell command, to which the file is an argument
	check  func([]byte) error // nil: anything may be stored
}

// editor is the user's, found as git finds it: VISUAL needs a terminal that can do more than
// print lines.
func editor() string {
	if term := os.Getenv("TERM"); term != "" && term != "dumb" {
		if e := os.Getenv("VISUAL"); e != "" {
			return e
		}
	}
	if e := os.Getenv("EDITOR"); e != "" {
		return e
	}
	return "vi"
}

// run lets the user edit the blob and stores the outcome, under a digest of the same
// algorithm. What was edited and can't be stored stays where the error says.
func (e edit) run(ctx context.Context, old digest.Digest) (record, error) {
	// A directory, so that what the editor puts beside the file is private and goes too.
	dir, err := os.MkdirTemp("", "dist-edit-")
	if err != nil {
		return record{}, err
	}
	keep := false
	defer func() {
		if !keep {
			_ = os.RemoveAll(dir)
		}
	}()
	path, err := e.copyOut(old, dir)
	if err != nil {
		return record{}, err
	}
	if err := e.runEditor(ctx, path); err != nil {
		return record{}, err
	}
	r, err := e.storeEdited(ctx, path, old)
	if err != nil && ctx.Err() == nil {
		keep = true
		return record{}, fmt.Errorf("%w (what was edited is kept in %s)", err, path)
	}
	return r, err
}

// copyOut puts the blob into a file of dir, named so that an editor knows JSON.
func (e edit) copyOut(dgst digest.Digest, dir string) (string, error) {
	blob, err := e.store.File(dgst)
	if err != nil {
		return "", err
	}
	defer blob.Close()
	name := "blob"
	if blob.Size() <= image.MaxDocument {
		b := make([]byte, blob.Size())
		if _, err := blob.ReadAt(b, 0); err == nil && json.Valid(b) {
			name += ".json"
		}
	}
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(f, blob.File)
	return path, errors.Join(err, f.Close())
}

// runEditor waits for the editor, which has the terminal. An interrupt is the editor's
// matter: vi, for one, takes it for the end of a command. Other signals end the editor.
func (e edit) runEditor(ctx context.Context, path string) error {
	c := exec.CommandContext(ctx, "sh", "-c", e.editor+` "$@"`, e.editor, path)
	c.Cancel = func() error { return c.Process.Signal(unix.SIGTERM) }
	c.WaitDelay = 5 * time.Second
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	if _, ok := cli.IsTerminal(os.Stdout); !ok {
		// Standard output is for the digest.
		c.Stdout = os.Stderr
		if _, ok := cli.IsTerminal(os.Stdin); ok {
			if tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0); err == nil {
				defer tty.Close()
				c.Stdout = tty
			}
		}
	}
	interrupts := make(chan os.Signal, 1)
	if !signal.Ignored(unix.SIGINT) {
		// Before the start: the editor may get the first one at once.
		signal.Reset(unix.SIGINT) // from who would cancel ctx
		signal.Notify(interrupts, unix.SIGINT)
		defer signal.Reset(unix.SIGINT)
	}
	if err := c.Start(); err != nil {
		return fmt.Errorf("editor %s: %w", e.editor, err)
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case <-interrupts:
				_ = c.Process.Signal(unix.SIGINT)
			case <-ended:
				return
			}
		}
	}()
	err := c.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == unix.SIGINT {
		return errInterrupted
	}
	if err != nil {
		return fmt.Errorf("editor %s: %w", e.editor, err)
	}
	return nil
}

// errInterrupted: an interrupt ended the editor.
var errInterrupted = errors.New("interrupted")

// storeEdited stores the file, which the editor may have put in the place of the one it got.
func (e edit) storeEdited(ctx context.Context, path string, old digest.Digest) (record, error) {
	f, err := os.Open(path)
	if err != nil {
		return record{}, err
	}
	defer f.Close()
	h := old.Algorithm().Digester()
	size, err := io.Copy(h.Hash(), f)
	if err != nil {
		return record{}, err
	}
	r := record{h.Digest(), size}
	if e.check != nil {
		if size > image.MaxDocument {
			return r, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%d bytes are too many for a manifest or config", size))
		}
		b := make([]byte, size)
		if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
			return r, err
		}
		if err := e.check(b); err != nil {
			return r, err
		}
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return r, err
	}
	_, err = content.WriteBlob(ctx, e.store, string(r.Digest), f, size, r.Digest)
	return r, err
}
