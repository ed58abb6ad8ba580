package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/snapshot"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const killAfter = 5 * time.Second

func newStack(s *store) *cobra.Command {
	c := &cobra.Command{Use: "stack [flags] -- COMMAND [ARG…]", Short: "make a chain of committed snapshots, each filled by COMMAND", Args: cobra.MinimumNArgs(1)}
	noSync := noSyncFlag(c)
	parent := c.Flags().String("parent", "", "the committed snapshot `PARENT` below the first one")
	jobs := c.Flags().IntP("jobs", "j", 8, "at most `N` commands at a time")
	zero(c)
	c.Flags().SetInterspersed(false)
	c.RunE = func(c *cobra.Command, args []string) error {
		if *jobs < 1 {
			return cli.Usagef("--jobs: %d is less than 1", *jobs)
		}
		sn, err := s.openWith(c.Context(), *noSync)
		if err != nil {
			return err
		}
		turn, err := unix.MemfdCreate("large zstd windows", unix.MFD_CLOEXEC)
		if err != nil {
			return fmt.Errorf("create the lock of large zstd windows: %w", err)
		}
		defer unix.Close(turn)
		env := append(os.Environ(), fmt.Sprintf("DIST_WINDOW_LOCK=/proc/%d/fd/%d", os.Getpid(), turn))
		step := progress.Begin("layers")
		defer step.End()
		var layers []snapshot.Layer
		if err := cli.Each(c, []string{"-"}, func(line string) error {
			fields := strings.Split(line, "\t")
			layers = append(layers, snapshot.Layer{
				Name: fields[len(fields)-1],
				Apply: func(ctx context.Context, p snapshot.Place) error {
					err := fill(ctx, substitute(args, fields, p), env, p)
					step.Count()
					return err
				},
			})
			return nil
		}); err != nil {
			return err
		}
		step.Total(0, int64(len(layers)))
		return sn.Stack(c.Context(), *parent, layers, *jobs, func(name string) error {
			_, err := fmt.Fprintln(c.OutOrStdout(), name)
			return err
		})
	}
	return c
}

// substitute replaces placeholders in a command's arguments.
func substitute(args, fields []string, p snapshot.Place) []string {
	words := []string{"{dir}", p.Dir, "{whiteouts}", p.Whiteouts, "{unresolved}", p.Unresolved}
	for i, f := range fields {
		words = append(words, "{"+strconv.Itoa(i+1)+"}", f)
	}
	r := strings.NewReplacer(words...)
	out := make([]string, len(args))
	for i, a := range args {
		out[i] = r.Replace(a)
	}
	return out
}

// fill runs a command that fills a snapshot. The command has its own process group, which gets a signal when ctx is
// done. If this process is killed, the kernel signals the command.
func fill(ctx context.Context, args, env []string, p snapshot.Place) error {
	c := exec.Command(args[0], args[1:]...)
	c.Env, c.Stderr = env, os.Stderr
	if p.File != nil {
		c.ExtraFiles = []*os.File{p.File}
	}
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	runtime.LockOSThread() // the kernel watches the thread
	defer runtime.UnlockOSThread()
	if err := c.Start(); err != nil {
		return cli.NotStarted(err)
	}
	group := -c.Process.Pid
	stop := context.AfterFunc(ctx, func() {
		_ = syscall.Kill(group, syscall.SIGTERM)
		time.AfterFunc(killAfter, func() { _ = syscall.Kill(group, syscall.SIGKILL) })
	})
	_ = c.Wait() // its ProcessState is used instead
	stop()
	if err := ctx.Err(); err != nil {
		waitGroup(group)
		return err
	}
	switch ws := c.ProcessState.Sys().(syscall.WaitStatus); {
	case ws.Signaled():
		return cli.Exit(128 + int(ws.Signal()))
	case ws.ExitStatus() != 0:
		return cli.Exit(ws.ExitStatus())
	}
	return nil
}

// waitGroup waits until a process group has ended. Processes started by a command may outlive it for a moment, and need
// the directory that is about to be removed. It does not wait for zombies that nobody reaps.
func waitGroup(group int) {
	for end := time.Now().Add(killAfter + time.Second); time.Now().Before(end) && syscall.Kill(group, 0) == nil; {
		time.Sleep(2 * time.Millisecond)
	}
}
