package main

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/image/look"
)

// item is a file or directory in ncdu's export.
type item struct {
	Name   string `json:"name"`
	Size   int64  `json:"asize,omitempty"`
	Disk   int64  `json:"dsize,omitempty"`
	Inode  uint64 `json:"ino,omitempty"`
	Links  uint32 `json:"nlink,omitempty"`
	Linked bool   `json:"hlnkc,omitempty"`
	Other  bool   `json:"notreg,omitempty"`
}

// export writes ncdu's export format 1.2, <https://dev.yorhel.nl/ncdu/jsonfmt>. A directory is an array: itself, then
// its entries.
func export(w io.Writer, name string, u *look.Usage) error {
	head, err := json.Marshal(map[string]any{"progname": "dist-du", "progver": cli.Version(), "timestamp": time.Now().Unix()})
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(w, "[1,2,%s", head); err != nil {
		return err
	}
	err = u.Walk(func(f *look.FileUsage) error {
		v, open := item{Name: f.Name}, ""
		switch {
		case f.Path == "/":
			v.Name, open = name, "["
		case f.Dir:
			open = "["
		default:
			v.Size, v.Disk, v.Other = f.Bytes, f.Bytes, f.Type != look.File
			if f.Links > 1 {
				v.Inode, v.Links, v.Linked = f.ID, f.Links, true
			}
		}
		b, err := json.Marshal(v)
		if err == nil {
			_, err = fmt.Fprintf(w, ",\n%s%s", open, b)
		}
		return err
	}, func(*look.FileUsage) error {
		_, err := io.WriteString(w, "]")
		return err
	})
	if err == nil {
		_, err = io.WriteString(w, "]\n")
	}
	return err
}
