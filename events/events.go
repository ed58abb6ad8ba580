// Package events is the log of what changed in a store: one JSON object a line, appended by
// whoever made the change (distkit-layout(5), events). Topics are containerd's, where it has
// one.
//
// The log is a convenience and no truth: what can't be logged has happened all the same.
package events

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"distkit/disk"

	"golang.org/x/sys/unix"
)

// limit is the size in bytes that the log does not exceed: it is put aside before.
var limit int64 = 16 << 20

// maxLine bounds a line that is read. A longer one is no event.
const maxLine = 4 << 20

const (
	current = "events"
	aside   = "events.1"
)

// Event is one change. Of the fields after Topic those are set that the topic has.
type Event struct {
	Time        time.Time         `json:"time"`
	Namespace   string            `json:"namespace"` // "" for what all share: blobs, snapshots named by digest
	Topic       string            `json:"topic"`
	Name        string            `json:"name,omitempty"` // of an image, a namespace or a committed snapshot
	Digest      string            `json:"digest,omitempty"`
	Size        int64             `json:"size,omitempty"`  // bytes; absent for 0
	Count       int               `json:"count,omitempty"` // of blobs that a sweep has deleted
	Key         string            `json:"key,omitempty"`
	Parent      string            `json:"parent,omitempty"`
	Snapshotter string            `json:"snapshotter,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Container   string            `json:"container,omitempty"`
	Exec        string            `json:"exec,omitempty"`
	Pid         int               `json:"pid,omitempty"`
	Status      *int              `json:"status,omitempty"` // of a process that has ended, where it is known
}

// Field gives the fields that containerd's filters know: namespace, topic, and event.FIELD for
// the others, which may be called without "event." too.
func (e Event) Field(fieldpath []string) (value string, present bool) {
	if len(fieldpath) > 1 && fieldpath[0] == "event" {
		fieldpath = fieldpath[1:]
	}
	if len(fieldpath) > 1 && fieldpath[0] == "labels" {
		value, present = e.Labels[strings.Join(fieldpath[1:], ".")]
		return value, present
	}
	switch strings.Join(fieldpath, ".") {
	case "topic":
		value = e.Topic
	case "namespace":
		value = e.Namespace
	case "name":
		value = e.Name
	case "digest":
		value = e.Digest
	case "size":
		if e.Digest != "" || e.Count != 0 {
			value = strconv.FormatInt(e.Size, 10)
		}
	case "count":
		if e.Count != 0 {
			value = strconv.Itoa(e.Count)
		}
	case "key":
		value = e.Key
	case "parent":
		value = e.Parent
	case "snapshotter":
		value = e.Snapshotter
	case "container":
		value = e.Container
	case "exec":
		value = e.Exec
	case "pid":
		if e.Pid != 0 {
			value = strconv.Itoa(e.Pid)
		}
	case "status":
		if e.Status != nil {
			value = strconv.Itoa(*e.Status)
		}
	}
	return value, value != ""
}

// maxBatch bounds what is written under one lock, in bytes, so that others never wait long, and a log that is begun anew
// holds it.
const maxBatch = 256 << 10

// Append adds events, of now, to the log of the store at root. It takes a lock for an instant for some thousands of them,
// and tells nobody whether it could.
func Append(root string, all ...Event) {
	now := time.Now().UTC()
	var lines []byte
	for _, e := range all {
		e.Time = now
		line, err := json.Marshal(e)
		if err != nil {
			continue
		}
		if len(lines)+len(line) >= maxBatch {
			_ = write(root, lines)
			lines = nil
		}
		lines = append(append(lines, line...), '\n')
	}
	if len(lines) > 0 {
		_ = write(root, lines)
	}
}

// patience bounds how long the lock of the log is waited for.
const patience = 2 * time.Second

func write(root string, lines []byte) error {
	tree := disk.Tree(root)
	// The change itself has happened: it doesn't wait for who keeps the log locked.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		f, err := tree.LockFile(ctx, current, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o666, unix.LOCK_EX)
		if err != nil {
			return err
		}
		again, err := writeTo(tree, f, lines)
		disk.Release(f)
		if !again || err != nil {
			return err
		}
	}
}

// writeTo appends lines to the log, whose lock is held. again is true if it has put the log aside instead.
func writeTo(tree disk.Tree, f *os.File, lines []byte) (again bool, err error) {
	fi, err := f.Stat()
	if err != nil {
		return false, err
	}
	size := fi.Size()
	if size > 0 && size+int64(len(lines)) > limit {
		// Those who wait for the lock find another file, or none, of that name.
		return true, tree.Rename(current, aside)
	}
	if size > 0 {
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, size-1); err != nil {
			return false, err
		}
		if last[0] != '\n' {
			lines = append([]byte{'\n'}, lines...) // a writer was killed within its line
		}
	}
	if _, err := f.Write(lines); err != nil {
		return false, errors.Join(err, f.Truncate(size)) // a full disk leaves no half a line
	}
	return false, nil
}

// Log reads the events of a store from the oldest that is kept.
type Log struct {
	root  string
	files []*os.File // in the order in which they are read; the last may be the current one
	part  []byte     // the beginning of a line
	long  bool       // the line is longer than maxLine
}

// Open opens the log of the store at root, which need not be there.
func Open(root string) (*Log, error) {
	l := &Log{root: root}
	for {
		now, err := open(root, current)
		if err != nil {
			return nil, err
		}
		before, err := open(root, aside)
		if err != nil {
			closeAll(now)
			return nil, err
		}
		if now != nil && before != nil && same(now, before) {
			closeAll(now, before) // it was put aside in between
			continue
		}
		for _, f := range []*os.File{before, now} {
			if f != nil {
				l.files = append(l.files, f)
			}
		}
		return l, nil
	}
}

// open returns nil where there is no such file.
func open(root, name string) (*os.File, error) {
	f, err := disk.Tree(root).Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}

func same(a, b *os.File) bool {
	x, err := a.Stat()
	if err != nil {
		return false
	}
	y, err := b.Stat()
	return err == nil && os.SameFile(x, y)
}

// Close ends reading.
func (l *Log) Close() error {
	closeAll(l.files...)
	l.files = nil
	return nil
}

// Read calls f with every event that was appended since the last call, and its line with the
// newline, which is valid until f returns. Lines that are no events, torn ones too, are passed over.
func (l *Log) Read(f func(e Event, line []byte) error) error {
	if err := l.find(); err != nil {
		return err
	}
	for i, file := range l.files {
		if err := l.readFile(file, f); err != nil {
			return err
		}
		if i < len(l.files)-1 {
			l.part, l.long = nil, false
			_ = file.Close()
		}
	}
	if n := len(l.files); n > 1 {
		l.files = l.files[n-1:]
	}
	return nil
}

// Count counts the events that want selects among those that Read would give at once. Read gives them still.
func (l *Log) Count(want func(e Event) (bool, error)) (n int, err error) {
	for _, file := range l.files {
		from, err := file.Seek(0, io.SeekCurrent)
		if err != nil {
			return 0, err
		}
		err = l.readFile(file, func(e Event, _ []byte) error {
			ok, err := want(e)
			if ok {
				n++
			}
			return err
		})
		l.part, l.long = nil, false
		if err != nil {
			return 0, err
		}
		if _, err := file.Seek(from, io.SeekStart); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// find adds the files that have come since.
func (l *Log) find() error {
	newer, err := Open(l.root)
	if err != nil {
		return err
	}
	for i := len(newer.files) - 1; i >= 0 && len(l.files) > 0; i-- {
		if same(newer.files[i], l.files[len(l.files)-1]) {
			closeAll(newer.files[:i+1]...)
			l.files = append(l.files, newer.files[i+1:]...)
			return nil
		}
	}
	// None of them is known: all came since.
	l.files = append(l.files, newer.files...)
	return nil
}

func (l *Log) readFile(file *os.File, f func(Event, []byte) error) error {
	if err := l.restart(file); err != nil {
		return err
	}
	b := make([]byte, 64<<10)
	for {
		n, err := file.Read(b)
		for rest := b[:n]; len(rest) > 0; {
			end := bytes.IndexByte(rest, '\n')
			if end < 0 {
				l.add(rest)
				break
			}
			l.add(rest[:end+1])
			rest = rest[end+1:]
			if err := l.line(f); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// restart goes back to the beginning of a file that was made shorter than what was read of it, as by "> events": what it has now
// was appended since.
func (l *Log) restart(file *os.File) error {
	fi, err := file.Stat()
	if err != nil {
		return err
	}
	at, err := file.Seek(0, io.SeekCurrent)
	if err != nil || at <= fi.Size() {
		return err
	}
	l.part, l.long = nil, false
	_, err = file.Seek(0, io.SeekStart)
	return err
}

// add goes on with a line. Of one that is too long nothing is kept.
func (l *Log) add(b []byte) {
	if l.long = l.long || len(l.part)+len(b) > maxLine; l.long {
		l.part = l.part[:0]
		return
	}
	l.part = append(l.part, b...)
}

// line calls f with the line that has ended, if it is an event.
func (l *Log) line(f func(Event, []byte) error) error {
	line, long := l.part, l.long
	l.part, l.long = l.part[:0], false
	var e Event
	if long || json.Unmarshal(line, &e) != nil || e.Topic == "" {
		return nil
	}
	return f(e, line)
}
