// Registry serves a tree of OCI image layouts over plain HTTP on a loopback address. It is meant for tests, for the
// demo, and to see which requests a client makes.
//
//	registry --dir DIR [--addr HOST:PORT] [--ready FILE] [--read-only] [--fault FAULT]...
//	         [--with-parent] [--with-stdin]
//
// <DIR>/<repository> is a layout whose ref.name annotations are the tags. What other programs write there is seen at
// once. SIGTERM or SIGINT ends the registry. With --with-parent it also ends when the process that started it does, and
// with --with-stdin at the end of its standard input, so that a script leaves nothing running.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"distkit/testdata/registry/faults"
	"distkit/testdata/registry/layouts"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
}

func run() error {
	dir := flag.String("dir", "", "the `DIR` of layouts")
	addr := flag.String("addr", "127.0.0.1:0", "listen at `HOST:PORT`; port 0: any that is free")
	ready := flag.String("ready", "", "write the address to `FILE` once it listens")
	readOnly := flag.Bool("read-only", false, "never write to the layouts")
	withParent := flag.Bool("with-parent", false, "end when the parent process does")
	withStdin := flag.Bool("with-stdin", false, "end at the end of standard input")
	var list []faults.Fault
	flag.Func("fault", "misbehave: `KIND[=ARG] [path=PIECE] [times=N]`, KIND one of\n"+kinds(), func(s string) error {
		f, err := faults.Parse(s)
		list = append(list, f)
		return err
	})
	flag.Parse()
	if *dir == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}

	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if *withParent {
		if err := endWithParent(stop); err != nil {
			return err
		}
	}
	if *withStdin {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			stop()
		}()
	}

	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	handler := faults.New(layouts.New(*dir, *readOnly))
	for _, f := range list {
		handler.Add(f)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	if err := announce(*ready, listener.Addr().String()); err != nil {
		return err
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	_ = server.Close()
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// endWithParent calls stop when the parent has ended. It uses a pidfd: PR_SET_PDEATHSIG would follow the thread that
// forked, which may end before its process.
func endWithParent(stop func()) error {
	fd, err := unix.PidfdOpen(os.Getppid(), 0)
	if err != nil {
		return fmt.Errorf("watch the parent process: %w", err)
	}
	go func() {
		defer stop()
		for {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	return nil
}

// announce writes the address to the file that --ready names. The file appears with its whole content.
func announce(file, addr string) error {
	if file == "" {
		_, err := fmt.Println(addr)
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".ready-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = fmt.Fprintln(tmp, addr)
	if err := errors.Join(err, tmp.Chmod(0o644), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), file)
}

func kinds() string {
	var lines []string
	for kind, arg := range faults.Kinds {
		if arg != "" {
			kind += "=" + arg
		}
		lines = append(lines, "  "+kind)
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}
