package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/image/serve"

	"golang.org/x/sys/unix"
)

// firstPassed is the first descriptor passed by a supervisor (sd_listen_fds(3)).
const firstPassed = 3

// open returns the listener passed by a supervisor, or else one on the address.
func open(address string) (net.Listener, error) {
	if os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		if n := os.Getenv("LISTEN_FDS"); n != "1" {
			return nil, cli.Usagef("LISTEN_FDS is %q: one socket is wanted", n)
		}
		f := os.NewFile(firstPassed, "LISTEN_FDS")
		defer f.Close()
		l, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("descriptor %d: %w", firstPassed, err)
		}
		return l, nil
	}
	path, local := strings.CutPrefix(address, "unix:")
	if !local {
		_, port, err := net.SplitHostPort(address)
		if err == nil {
			_, err = net.LookupPort("tcp", port)
		}
		if err != nil {
			return nil, cli.Usagef("--listen: %w", err)
		}
		return net.Listen("tcp", address)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// Only this user may access the socket, from its creation on.
	defer unix.Umask(unix.Umask(0o177))
	return net.Listen("unix", path)
}

// removeStale removes a socket on which nobody listens.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode()&os.ModeSocket == 0 {
		return nil // Listen reports what is wrong with it
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		return c.Close()
	}
	if errors.Is(err, unix.ECONNREFUSED) {
		return os.Remove(path)
	}
	return nil
}

// onStdio serves one connection: standard input if that is a socket, as from inetd, or else standard input and output.
func onStdio(ctx context.Context, s *serve.Server, config *tls.Config) error {
	// net.FileConn would leave the caller's pipe or terminal in non-blocking mode.
	if _, err := unix.GetsockoptInt(0, unix.SOL_SOCKET, unix.SO_TYPE); err == nil {
		c, err := net.FileConn(os.Stdin)
		if err != nil {
			return fmt.Errorf("standard input: %w", err)
		}
		return s.Serve(ctx, serve.Single(c), 1, config)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socketpair: %w", err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			return err
		}
		ends[i] = c.(*net.UnixConn)
	}
	in, err := cli.Stdin(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	read := make(chan error, 1)
	go func() {
		_, err := io.Copy(ends[0], in)
		if errors.Is(err, unix.EPIPE) || ended(err) {
			err = nil
		}
		read <- err
		_ = ends[0].CloseWrite()
	}()
	written := make(chan error, 1)
	go func() {
		// Without splice(2), so that a closed output kills this process by SIGPIPE.
		_, err := io.Copy(struct{ io.Writer }{cli.Stdout}, ends[0])
		_ = ends[0].Close() // without a reader, the server need not continue
		if ended(err) {
			err = nil // the server did not read everything, but its answers have been written
		}
		written <- err
	}()
	err = s.Serve(ctx, serve.Single(ends[1]), 1, config)
	if werr := <-written; err == nil && werr != nil {
		return fmt.Errorf("write standard output: %w", werr)
	}
	select {
	case rerr := <-read:
		if err == nil && rerr != nil {
			return fmt.Errorf("read standard input: %w", rerr)
		}
	default:
	}
	return err
}

// ended reports whether an error means that the server has closed the connection.
func ended(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET)
}
