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

// edit describes one call of the command.
type edit struct {
	store   *content.Store
	editor  string   // a shell command, which gets the file as an argument
	command []string // used instead of the editor: reads the old blob and writes the new one
	// put stores the file with the result. The caller closes the file.
	put func(ctx context.Context, f *os.File) (record, error)
}

// editor returns the user's editor, by git's rules: VISUAL is used only on a terminal that can do more than print
// lines.
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

// run edits the blob and stores the result. If a manual edit can't be stored, the file is kept, and the error names it.
func (e edit) run(ctx context.Context, old digest.Digest) (record, error) {
	// A directory, so that the editor's other files are private and are deleted too.
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
	// The editor may have replaced the file.
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

// runCommand runs the command with the blob as standard input and the new file as standard output.
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

// copyOut copies the blob to a file in dir. The name tells editors that it is JSON.
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

// runEditor runs the editor on the terminal. Interrupts are left to the editor: for vi, one ends the current command.
// Other signals end the editor.
func (e edit) runEditor(ctx context.Context, path string) error {
	c := exec.CommandContext(ctx, "sh", "-c", e.editor+` "$@"`, e.editor, path)
	c.Cancel = func() error { return c.Process.Signal(unix.SIGTERM) }
	c.WaitDelay = 5 * time.Second
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	if _, ok := cli.IsTerminal(os.Stdout); !ok {
		// standard output is for the digest
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
		// Before the start, since the editor may get a signal at once.
		signal.Reset(unix.SIGINT) // it must not cancel ctx
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

// errInterrupted reports that an interrupt ended the editor.
var errInterrupted = errors.New("interrupted")

// storeBlob stores the file if it passes check, which may be nil. The digest uses the algorithm of old.
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

// readDocument reads a whole file that must be a manifest, an index or a config, and seeks back to its beginning.
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
