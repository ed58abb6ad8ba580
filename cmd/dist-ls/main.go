// Dist-ls lists what is in an image, without unpacking it.
package main

import (
	"archive/tar"
	"fmt"
	"io"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/inside"
	"distkit/cmd/internal/remoteimage"
	"distkit/errclass"
	"distkit/image/look"
	"distkit/layer"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func main() {
	c := &cobra.Command{
		Use:   "dist-ls [flags] NAME|DIGEST|- [PATH…]",
		Short: "list the files of an image",
		Args:  cobra.MinimumNArgs(1),
	}
	flags := inside.NewFlags(c)
	far := remoteimage.NewFlags(c)
	l := lister{found: map[string]bool{}}
	recursive := c.Flags().BoolP("recursive", "R", false, "list what is below directories, too")
	one := c.Flags().String("layer", "", "list the entries of one layer, as the archive has them: `N` from 1 on, the lowest first, or from -1 on; or its digest")
	changes := c.Flags().Bool("changes", false, "list what each layer adds (A), changes (C) and deletes (D)")
	c.Flags().BoolVarP(&l.long, "long", "l", false, "list mode, owner, size, time and target, too")
	c.Flags().BoolVar(&l.layers, "layers", false, "list which layer wrote each last, too")
	l.records = cli.NewRecords(c, "PATH")
	c.RunE = func(c *cobra.Command, args []string) error {
		layers, err := far.Layers(c.Context(), args[0], flags)
		if err != nil {
			return err
		}
		of := len(layers)
		if *one != "" {
			if of, err = look.Choose(layers, *one); err != nil {
				return err
			}
			of++
		}
		l.layers, l.changes = l.layers || *changes, *changes
		l.setColumns()
		switch paths := args[1:]; {
		case *changes:
			_, err = look.Read(c.Context(), layers[:of], look.Options{MaxMemory: flags.Memory(), Change: func(e *look.Entry) error {
				if *one != "" && e.Layer != of {
					return nil
				}
				return l.below(paths, e)
			}})
		case *one != "":
			err = layers[of-1].Walk(c.Context(), nil, func(_ int64, h *tar.Header, _ io.Reader) error {
				e, err := look.EntryOf(h)
				if err != nil {
					return fmt.Errorf("entry %.200q: %w", h.Name, err)
				}
				e.Layer = of
				return l.below(paths, e)
			})
		default:
			if len(paths) == 0 {
				paths = []string{"/"}
			}
			tree, rerr := look.Read(c.Context(), layers, look.Options{MaxMemory: flags.Memory()})
			if rerr != nil {
				return rerr
			}
			err = cli.Each(c, paths, func(p string) error { return tree.List(p, *recursive, l.write) })
		}
		if err == nil && (*changes || *one != "") {
			err = l.missing(c, args[1:])
		}
		if cerr := l.records.Close(); err == nil {
			err = cerr
		}
		return err
	}
	cli.Main(c)
}

// A lister prints entries.
type lister struct {
	records               *cli.Records
	long, layers, changes bool
	found                 map[string]bool // paths that are listed, or that have an entry below them
}

func (l *lister) setColumns() {
	columns := []string{"PATH"}
	if l.changes {
		columns = append(columns, "CHANGE")
	}
	if l.layers {
		columns = append(columns, "LAYER")
	}
	if l.long {
		columns = append(columns, "MODE", "OWNER", "SIZE", "MODIFIED", "TARGET")
	}
	l.records.Columns(columns...)
}

func (l *lister) write(e *look.Entry) error {
	cells := []any{cli.Name(e.Path)}
	if l.changes {
		cells = append(cells, e.Change)
	}
	if l.layers {
		cells = append(cells, e.Layer)
	}
	if l.long {
		target := e.Target
		if e.Type == look.Char || e.Type == look.Block {
			target = fmt.Sprintf("%d:%d", e.Device[0], e.Device[1])
		}
		cells = append(cells, e.ModeString(), fmt.Sprintf("%d:%d", e.UID, e.GID), cli.Size(e.Size), e.ModTime, cli.Name(target))
	}
	return l.records.Write(e, cells...)
}

// below prints an entry if it is at one of the paths or below one. Without paths it prints every entry.
func (l *lister) below(paths []string, e *look.Entry) error {
	listed := len(paths) == 0
	for _, p := range paths {
		if clean := "/" + layer.Clean(p); clean == "/" || e.Path == clean || strings.HasPrefix(e.Path, clean+"/") {
			listed, l.found[p] = true, true
		}
	}
	if !listed {
		return nil
	}
	return l.write(e)
}

// missing reports the paths for which nothing was printed.
func (l *lister) missing(c *cobra.Command, paths []string) error {
	t := cli.Tally{C: c}
	for _, p := range paths {
		if !l.found[p] && layer.Clean(p) != "" {
			if err := t.Add(errclass.Errorf(errdefs.ErrNotFound, "%.200q: there is no entry of this path", p)); err != nil {
				return err
			}
		}
	}
	return t.End()
}
