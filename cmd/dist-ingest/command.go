package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/disk"

	"github.com/containerd/errdefs"
)

const (
	// Statuses that all commands of the suite share, and the shell's.
	wrongUsage   = 2
	unverified   = 4
	tryLater     = 6
	maxIdle      = 3       // successive attempts that may bring less than enough
	enough       = 4 << 10 // in bytes; otherwise a server could make us retry for every byte
	firstBackoff = 200 * time.Millisecond
	killAfter    = 5 * time.Second
)

// fromCommand stores the command's output. If the command exits with status 6, and has made enough progress, it is run
// again from the new offset. If the result of several runs does not verify, it is run once more from the beginning.
func (in *ingest) fromCommand(ctx context.Context, w *content.Writer) (record, error) {
	// Without an expected digest, and with a command that ignores the offset, nothing would reveal that two pieces do
	// not fit together.
	resumable := in.expected != "" || strings.Contains(strings.Join(in.command, " "), "{offset}") ||
		strings.Contains(strings.Join(in.command, " "), "DIST_OFFSET")
	if in.expected != "" && w.Digest() == in.expected {
		return in.commit(ctx, w) // complete, except for the commit
	}
	anew := !resumable
	pieces := resumable && w.Offset() > 0
	best, idle, backoff := w.Offset(), 0, firstBackoff
	for {
		if anew && w.Offset() > 0 {
			if err := w.Truncate(0); err != nil {
				return record{}, err
			}
		}
		status, err := in.attempt(ctx, w)
		var r record
		if err == nil && status == 0 {
			if r, err = in.commit(ctx, w); err == nil {
				return r, nil
			}
		}
		wrong := errdefs.IsDataLoss(err) || err == nil && (status == unverified || status == wrongUsage)
		switch {
		case wrong && pieces:
			anew, pieces = true, false
			best, idle, backoff = 0, 0, firstBackoff
			continue
		case err != nil:
			return record{}, err
		case status == unverified && !in.keep:
			return record{}, errors.Join(cli.Exit(status), w.Abort())
		case status != tryLater:
			return record{}, cli.Exit(status)
		}
		if w.Offset() >= best+enough {
			best, idle, backoff = w.Offset(), 0, firstBackoff
		} else if idle++; idle >= maxIdle {
			return record{}, cli.Exit(status)
		}
		anew = !resumable
		pieces = resumable && w.Offset() > 0
		select {
		case <-time.After(backoff/2 + rand.N(backoff/2)):
		case <-ctx.Done():
			return record{}, ctx.Err()
		}
		backoff *= 2
	}
}

// attempt runs the command once, from the stored offset on, and returns its exit status.
func (in *ingest) attempt(ctx context.Context, w *content.Writer) (status int, err error) {
	offset := strconv.FormatInt(w.Offset(), 10)
	args := make([]string, len(in.command))
	for i, a := range in.command {
		args[i] = strings.ReplaceAll(a, "{offset}", offset)
	}
	r, p, err := os.Pipe()
	if err != nil {
		return 0, fmt.Errorf("pipe: %w", err)
	}
	defer r.Close()
	disk.WidenPipe(p)
	c := exec.Command(args[0], args[1:]...)
	c.Env = append(os.Environ(), "DIST_OFFSET="+offset)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, p, os.Stderr
	defer tie(c)()
	err = c.Start()
	_ = p.Close()
	if err != nil {
		return 0, cli.NotStarted(err)
	}
	err = content.Copy(ctx, in.sink(w), r)
	if err != nil {
		// The command must not go on writing, or outlive us.
		_ = r.Close()
		_ = c.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(killAfter, func() { _ = c.Process.Kill() })
		defer kill.Stop()
	} else {
		stop := context.AfterFunc(ctx, func() { _ = c.Process.Signal(syscall.SIGTERM) })
		defer stop()
	}
	_ = c.Wait() // its ProcessState is used instead
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return 0, err
	}
	ws := c.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return ws.ExitStatus(), nil
}
