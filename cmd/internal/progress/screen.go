package progress

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A screen is the rows of a terminal, above the cursor, that are drawn again and again. Of the processes of one terminal one draws at a time:
// the first, until it is done.
type screen struct {
	out  *os.File
	mu   sync.Mutex
	lock *os.File // the terminal, opened again and locked; nil while another process draws
	rows []int    // widths of the rows drawn last
}

// drawn is the screen that this process draws on.
var drawn atomic.Pointer[screen]

// Erase takes away what this process has drawn, if anything, and calls write, which writes a message. What is drawn next is below the message.
func Erase(write func()) {
	if s := drawn.Load(); s != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.erase()
	}
	write()
}

// size returns the columns and rows of the terminal. ok is false if nothing is to be drawn: out is no terminal, or one that can't move its
// cursor, or this process is in its background, where the terminal may stop it for writing.
func (s *screen) size() (width, height int, ok bool) {
	ws, err := unix.IoctlGetWinsize(int(s.out.Fd()), unix.TIOCGWINSZ)
	if err != nil || os.Getenv("TERM") == "dumb" {
		return 0, 0, false
	}
	if group, err := unix.IoctlGetInt(int(s.out.Fd()), unix.TIOCGPGRP); err == nil && group != unix.Getpgrp() {
		return 0, 0, false
	}
	width, height = int(ws.Col), int(ws.Row)
	if width == 0 {
		width = 80
	}
	if height == 0 {
		height = 24
	}
	return width, height, true
}

// begin reports whether this process may draw: no other one of the terminal does. A terminal that can't be opened again is not locked.
func (s *screen) begin() bool {
	if s.lock == nil {
		f, err := os.OpenFile(fmt.Sprintf("/dev/fd/%d", s.out.Fd()), os.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
		if err == nil && unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			f.Close()
			return false
		}
		if s.lock = f; err != nil {
			s.lock = s.out
		}
		drawn.Store(s)
	}
	return true
}

// draw replaces the rows drawn before, unless another process draws. Their texts are printable.
func (s *screen) draw(lines []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	width, _, ok := s.size()
	if !ok || !s.begin() {
		return
	}
	var b strings.Builder
	b.WriteString(s.up(width))
	s.rows = s.rows[:0]
	for _, l := range lines {
		b.WriteString(l + "\x1b[K\n")
		s.rows = append(s.rows, len(l))
	}
	b.WriteString("\x1b[J")
	_, _ = s.out.WriteString(b.String())
}

// erase takes the rows away. The caller holds mu.
func (s *screen) erase() {
	width, _, ok := s.size()
	if ok && len(s.rows) > 0 {
		_, _ = s.out.WriteString(s.up(width) + "\x1b[J")
	}
	s.rows = nil
}

// end leaves the rows as they are, and lets other processes draw.
func (s *screen) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock == nil {
		return
	}
	drawn.CompareAndSwap(s, nil)
	if s.lock != s.out {
		s.lock.Close()
	}
	s.lock, s.rows = nil, nil
}

// up returns what moves the cursor to where the rows begin. Most terminals wrap a row that is wider than they have become.
func (s *screen) up(width int) string {
	rows := 0
	for _, n := range s.rows {
		if wraps() {
			rows += max(1, (n+width-1)/width)
		} else {
			rows++
		}
	}
	if rows == 0 {
		return "\r"
	}
	return fmt.Sprintf("\x1b[%dA\r", rows)
}

// wraps reports whether the terminal wraps rows again when it becomes narrower. Linux's console, xterm and screen(1) cut them off.
func wraps() bool {
	return os.Getenv("TERM") != "linux" && os.Getenv("XTERM_VERSION") == "" && os.Getenv("STY") == ""
}
