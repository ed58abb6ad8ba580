package main

import (
	"context"
	"maps"
	"os"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/image"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// imageEdit is an edit of a part of an image, from which a new image is made.
type imageEdit struct {
	store         *content.Store
	names         *image.Names
	name, newName string // "" for none
	replace       bool
	old           v1.Descriptor     // the image
	labels        map[string]string // labels of the name
	part          *image.Part
}

// put stores the part and the documents that lead to it, and names the new image.
func (i imageEdit) put(ctx context.Context, f *os.File) (record, error) {
	b, err := readDocument(f)
	if err != nil {
		return record{}, err
	}
	// The hold lasts as long as this process, since new objects have no name yet. It begins only now, because an editor
	// may be open for days.
	if _, err := i.store.Hold(ctx); err != nil {
		return record{}, err
	}
	target, err := i.part.Replace(ctx, b)
	if err != nil {
		return record{}, err
	}
	r := record{target.Digest, target.Size}
	if i.newName == "" {
		if i.replace {
			_, err = i.names.Move(ctx, i.name, i.old.Digest, target)
		}
		return r, err
	}
	target.Annotations = maps.Clone(i.labels)
	if target.Digest != i.old.Digest {
		maps.DeleteFunc(target.Annotations, func(k, _ string) bool { return layout.DescribesContent(k) })
	}
	name := i.names.Create
	if i.replace {
		name = i.names.Replace
	}
	_, err = name(ctx, i.newName, target)
	return r, err
}
