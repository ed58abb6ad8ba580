package main

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"distkit/cmd/internal/cli"
	"distkit/snapshot"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newDiff(s *store) *cobra.Command {
	c := &cobra.Command{Use: "diff [flags] KEY [-- FLAG…]", Short: "write what a snapshot changes as a layer, by dist-diff and its FLAGs", Args: cobra.MinimumNArgs(1)}
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) > 1 && c.ArgsLenAtDash() != 1 {
			return cli.Usagef("what follows KEY and -- are flags of dist-diff: %s", args[1])
		}
		return s.compare(c.Context(), args[0], func(compared *snapshot.Comparison) error {
			return distDiff(c.Context(), compared, args[1:], os.Stdout)
		})
	}
	return c
}

func (s *store) compare(ctx context.Context, key string, do func(*snapshot.Comparison) error) error {
	sn, err := s.open(ctx)
	if err != nil {
		return err
	}
	compared, err := sn.Compare(ctx, key)
	if err != nil {
		return err
	}
	defer compared.Close()
	return do(compared)
}

// distDiff runs dist-diff and returns its status.
func distDiff(ctx context.Context, compared *snapshot.Comparison, flags []string, out io.Writer) error {
	c := exec.CommandContext(ctx, "dist-diff", flags...)
	c.Stdout, c.Stderr = out, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	dirs := []*os.File{compared.Lower, compared.Upper}
	if compared.Overlay {
		c.Args = append(c.Args, "--overlay")
		dirs = dirs[1:]
	} else if compared.Lower == nil {
		dirs = dirs[1:]
	}
	for _, d := range dirs {
		// The descriptors keep their numbers, since the flags may name others of the caller's, such as /dev/fd/3.
		if _, err := unix.FcntlInt(d.Fd(), unix.F_SETFD, 0); err != nil {
			return err
		}
		c.Args = append(c.Args, fmt.Sprintf("/proc/self/fd/%d", d.Fd()))
	}
	runtime.LockOSThread() // the kernel watches the thread
	defer runtime.UnlockOSThread()
	err := c.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &exit) && exit.Exited():
		return cli.Exit(exit.ExitCode()) // it has reported the error
	case exit != nil && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGPIPE:
		return cli.Exit(128 + int(syscall.SIGPIPE)) // the shell's status for SIGPIPE
	case exit != nil:
		return fmt.Errorf("run dist-diff: %w", err)
	case err != nil:
		return cli.NotStarted(err)
	}
	return nil
}

func newChanges(s *store) *cobra.Command {
	c := &cobra.Command{Use: "changes [flags] KEY", Short: "list the paths that a snapshot adds (A), changes (C) and deletes (D)", Args: cobra.ExactArgs(1)}
	r := cli.NewRecords(c, "PATH", "CHANGE")
	c.RunE = func(c *cobra.Command, args []string) error {
		err := s.compare(c.Context(), args[0], func(compared *snapshot.Comparison) error {
			from, to := io.Pipe()
			ended := make(chan error, 1)
			go func() {
				err := distDiff(c.Context(), compared, []string{"--compress", "none"}, to)
				ended <- err
				to.CloseWithError(err)
			}()
			err := changes(compared, from, func(change, path string) error {
				v := struct {
					Path   string `json:"path"`
					Change string `json:"change"`
				}{path, change}
				return r.Write(v, path, change)
			})
			from.CloseWithError(err)
			return cmp.Or(err, <-ended)
		})
		if err != nil {
			return err
		}
		return r.Close()
	}
	return c
}

// changes calls f for each entry of a layer except the root directory. Paths are absolute.
func changes(compared *snapshot.Comparison, layer io.Reader, f func(change, path string) error) error {
	const whiteout, opaque = ".wh.", ".wh..wh..opq"
	replaced := map[string]map[string]bool{} // directories that replace the parent's: the names there that have no entry yet
	entries := tar.NewReader(layer)
	for {
		h, err := entries.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		name := path.Clean("/" + h.Name)
		dir, base := path.Split(name)
		dir = path.Clean(dir)
		if base == opaque {
			names, err := compared.LowerNames("." + dir)
			if err != nil {
				return err
			}
			replaced[dir] = map[string]bool{}
			for _, n := range names {
				replaced[dir][n] = true
			}
			continue
		}
		change := "D"
		if hidden, ok := strings.CutPrefix(base, whiteout); ok {
			name = path.Join(dir, hidden)
		} else if in, err := compared.InLower("." + name); err != nil {
			return err
		} else if change = "A"; in {
			change = "C"
		}
		delete(replaced[dir], path.Base(name))
		if name == "/" {
			continue
		}
		if err := f(change, name); err != nil {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, layer); err != nil {
		return err
	}
	for _, dir := range slices.Sorted(maps.Keys(replaced)) {
		for _, name := range slices.Sorted(maps.Keys(replaced[dir])) {
			if err := f("D", path.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}
