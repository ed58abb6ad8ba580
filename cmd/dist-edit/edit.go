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
	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// edit is what one call of the command is to do.
type edit struct {
	store   *content.Store
	editor  string   // a shell command, to which the file is an argument
	command []string // a program, in the place of the editor, that reads the blob and writes the new one
	// put stores the file that holds the outcome, the caller's to close.
	put func(ctx context.Context, f *os.File) (record, error)
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

// run has the blob edited, and stores the outcome. What was edited by hand and can't be stored stays where the error says.
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
	var path string
	if len(e.command) > 0 {
		path = filepath.Join(dir, "blob")
		err = e.runCommand(ctx, old, path)
	} else if path, err = e.copyOut(old, dir); err == nil {
		err = e.runEditor(ctx, path)
	}
	if err != nil {
		return record{}, err
	}
	// The editor may have put another file in the place of the one it got.
	f, err := os.Open(path)
	var r record
	if err == nil {
		defer f.Close()
		r, err = e.put(ctx, f)
	}
	if err != nil && ctx.Err() == nil && len(e.command) == 0 {
		keep = true
		err = fmt.Errorf("%w (what was edited is kept in %s)", err, path)
	}
	return r, err
}

// runCommand lets a program read the blob from its standard input, and write the new one into the file.
func (e edit) runCommand(ctx context.Context, old digest.Digest, path string) error {
	blob, err := e.store.File(old)
	if err != nil {
		return err
	}
	defer blob.Close()
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	c := exec.CommandContext(ctx, e.command[0], e.command[1:]...)
	c.Cancel = func() error { return c.Process.Signal(unix.SIGTERM) }
	c.WaitDelay = 5 * time.Second
	c.Stdin, c.Stdout, c.Stderr = blob.File, out, os.Stderr
	if err := c.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%s: %w", e.command[0], err)
	}
	return out.Close()
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

// storeBlob stores the file under a digest of the old one's algorithm, if it passes check, which may be nil.
func storeBlob(ctx context.Context, s *content.Store, f *os.File, old digest.Digest, check func([]byte) error) (record, error) {
	if check != nil {
		b, err := readDocument(f)
		if err == nil {
			err = check(b)
		}
		if err != nil {
			return record{}, err
		}
	}
	h := old.Algorithm().Digester()
	size, err := io.Copy(h.Hash(), f)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return record{}, err
	}
	r := record{h.Digest(), size}
	_, err = content.WriteBlob(ctx, s, string(r.Digest), f, size, r.Digest)
	return r, err
}

// readDocument reads all of a file that is to be a manifest, an index or a config, and leaves it at its beginning.
func readDocument(f *os.File) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, image.MaxDocument+1))
	if err == nil && len(b) > image.MaxDocument {
		err = errclass.Errorf(errdefs.ErrInvalidArgument, "more than %d bytes are too many for a manifest, index or config", image.MaxDocument)
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	return b, err
}
