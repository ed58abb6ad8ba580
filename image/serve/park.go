package serve

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// parkAfter is how long a connection may wait for the next request before it is taken back from net/http. It is longer
// than the pauses of a client that sends one request after another.
const parkAfter = 100 * time.Millisecond

// lease is a connection as net/http sees it. If no request arrives for a while its Read fails, so that net/http closes
// the lease and frees its memory. The connection behind it stays open.
//
// Only one Read may fail in this way: the one that waits for the first byte of a request while net/http's buffer is
// empty. Otherwise the rest of a request would be taken for a request of its own. net/http makes that Read after
// StateIdle and exactly one SetReadDeadline, that for idle connections. If its buffer already holds a part of the
// request, it doesn't read, or it reads less than a buffer, and then it sets the deadline again.
type lease struct {
	net.Conn
	bound  *bound
	buffer int          // the size of net/http's read buffer, which is empty at the first Read
	next   atomic.Int32 // the state on the way to the Read that may fail
	parked atomic.Bool  // the connection stays open when the lease is closed
	closed atomic.Bool
}

// The states on the way to the Read that may fail.
const (
	busy    = iota // a request is being read or served
	idle           // net/http waits for a request
	waiting        // and has set the deadline for that
)

// SetReadDeadline implements net.Conn.
func (l *lease) SetReadDeadline(t time.Time) error {
	if t.IsZero() || !l.next.CompareAndSwap(idle, waiting) {
		l.next.Store(busy)
	}
	return l.Conn.SetReadDeadline(t)
}

// Read implements net.Conn.
func (l *lease) Read(p []byte) (int, error) {
	if l.buffer == 0 {
		l.buffer = len(p)
	}
	if l.next.Swap(busy) != waiting || len(p) != l.buffer {
		return l.Conn.Read(p)
	}
	_ = l.Conn.SetReadDeadline(time.Now().Add(parkAfter))
	n, err := l.Conn.Read(p)
	if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		l.parked.Store(true)
	} else {
		_ = l.Conn.SetReadDeadline(time.Now().Add(headerPatience))
	}
	return n, err
}

// Close implements net.Conn.
func (l *lease) Close() error {
	if !l.parked.Load() {
		return l.Conn.Close()
	}
	if !l.closed.Swap(true) {
		go l.bound.park(l.Conn)
	}
	return nil
}

// ReadFrom implements io.ReaderFrom: the kernel moves a file to the connection without a copy in this process.
func (l *lease) ReadFrom(r io.Reader) (int64, error) { return io.Copy(l.Conn, r) }

// CloseWrite lets net/http close the sending direction.
func (l *lease) CloseWrite() error {
	if c, ok := l.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

// park waits for a connection's next request, and then hands the connection out again. It closes the connection if the
// client has gone or sends nothing.
func (b *bound) park(c net.Conn) {
	if !b.awaitRequest(c) {
		b.leave(c)
		return
	}
	select {
	case b.woken <- c:
	case <-b.closed:
		b.leave(c)
	}
}

// awaitRequest waits for data, and reports whether there is any. It consumes none.
func (b *bound) awaitRequest(c net.Conn) bool {
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil || c.SetReadDeadline(time.Now().Add(idlePatience)) != nil {
		return false
	}
	select {
	case <-b.closed:
		return false
	default:
	}
	ready := false
	err = raw.Read(func(fd uintptr) bool {
		var first [1]byte
		n, _, err := unix.Recvfrom(int(fd), first[:], unix.MSG_PEEK)
		for errors.Is(err, unix.EINTR) {
			n, _, err = unix.Recvfrom(int(fd), first[:], unix.MSG_PEEK)
		}
		ready = n > 0
		return !errors.Is(err, unix.EAGAIN)
	})
	return err == nil && ready
}
