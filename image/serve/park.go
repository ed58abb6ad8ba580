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

// parkAfter is how long a connection waits for its next request before it is taken from net/http. A client that sends requests one after the
// other does not wait for that.
const parkAfter = 100 * time.Millisecond

// lease is a connection as net/http sees it. If no request comes for a while, its Read fails, so that net/http closes the lease and frees what it has
// of it. The connection behind it stays open.
//
// Only one read may fail so: the one that waits for the first byte of a request, with nothing in net/http's buffer. Any other would make the rest of
// a request a request of its own. net/http makes it after StateIdle and exactly one SetReadDeadline, that for the idle connection. If a part of the
// request is in its buffer already, it doesn't read, or reads less than a buffer; then it sets the deadline again.
type lease struct {
	net.Conn
	bound  *bound
	buffer int          // the size of net/http's read buffer: it is empty at the first read
	next   atomic.Int32 // how near the read is that may fail
	parked atomic.Bool  // the connection lives on when the lease is closed
	closed atomic.Bool
}

// The steps to the read that may fail.
const (
	busy    = iota // a request is read or answered
	idle           // net/http has said that it waits for a request
	waiting        // it has set the deadline for that
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

// ReadFrom implements io.ReaderFrom: the kernel moves a file to the connection, without a copy in this process.
func (l *lease) ReadFrom(r io.Reader) (int64, error) { return io.Copy(l.Conn, r) }

// CloseWrite lets net/http end its direction of the connection.
func (l *lease) CloseWrite() error {
	if c, ok := l.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

// park waits for a connection's next request, and hands the connection out again. It closes one whose client has gone or sends nothing.
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

// awaitRequest reports whether there are bytes to read. It takes none.
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
