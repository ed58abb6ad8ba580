package stdio

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Console is the socket on which an OCI runtime hands over a process's terminal.
type Console struct {
	path     string
	dir      *os.File // the socket's directory; nil unless the socket's path is too long
	listener *net.UnixListener
	take     func(master *os.File) error
}

// maxSocket is the longest path of a socket in bytes (unix(7)).
const maxSocket = 107

// listen makes the socket. It replaces one left by a killed process. It calls take with the master of the terminal when
// that arrives.
func listen(path string, take func(master *os.File) error) (*Console, error) {
	_ = os.Remove(path)
	c := &Console{path: path, take: take}
	var err error
	if len(path) > maxSocket {
		// The runtime connects by this path too, so it names our process, not /proc/self.
		if c.dir, err = os.Open(filepath.Dir(path)); err != nil {
			return nil, fmt.Errorf("console socket: %w", err)
		}
		c.path = fmt.Sprintf("/proc/%d/fd/%d/%s", os.Getpid(), c.dir.Fd(), filepath.Base(path))
	}
	if c.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: c.path, Net: "unix"}); err != nil {
		_ = c.dir.Close()
		return nil, fmt.Errorf("console socket: %w", err)
	}
	return c, nil
}

// Path returns the socket's path, for the runtime.
func (c *Console) Path() string { return c.path }

// Receive accepts the terminal, which the runtime must have sent already.
func (c *Console) Receive() error {
	f, err := c.receive()
	if err == nil {
		err = c.take(f)
	}
	if err != nil {
		return fmt.Errorf("receive console: %w", err)
	}
	return nil
}

func (c *Console) receive() (*os.File, error) {
	if err := c.listener.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, err
	}
	conn, err := c.listener.AcceptUnix()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 4096), oob)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, err
	}
	if len(messages) != 1 {
		return nil, errors.New("no descriptor was sent")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	if len(fds) != 1 {
		return nil, errors.New("not one descriptor was sent")
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "console"), nil
}

// Close closes the socket. Console may be nil.
func (c *Console) Close() {
	if c != nil {
		_ = c.listener.Close()
		_ = c.dir.Close()
	}
}
