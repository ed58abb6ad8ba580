// Command dist-namespace keeps the partitions of a store's names.
package main

import (
	"fmt"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"

	"github.com/spf13/cobra"
)

func main() {
	c := &cobra.Command{
		Use:   "dist-namespace VERB",
		Short: "create, label, list and remove namespaces",
	}
	c.AddCommand(newCreate(), newLabel(), newLs(), newRm())
	cli.Main(c)
}

func open(root string) (image.Namespaces, error) {
	store, err := content.Open(root)
	if err != nil {
		return image.Namespaces{}, err
	}
	return image.OpenNamespaces(store), nil
}

func newCreate() *cobra.Command {
	c := &cobra.Command{
		Use:   "create [flags] NAMESPACE [KEY=VALUE…]",
		Short: "make a namespace, with labels",
		Args:  cobra.MinimumNArgs(1),
	}
	root := cli.Root(c.Flags())
	c.RunE = func(c *cobra.Command, args []string) error {
		all, err := open(*root)
		if err != nil {
			return err
		}
		labels, err := cli.Labels(args[1:])
		if err != nil {
			return err
		}
		if err := all.Create(c.Context(), args[0], labels); err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.OutOrStdout(), args[0])
		return err
	}
	return c
}

func newLabel() *cobra.Command {
	c := &cobra.Command{
		Use:   "label [flags] NAMESPACE [KEY=VALUE…]",
		Short: "set labels of a namespace (KEY= takes one away) and list them all",
		Args:  cobra.MinimumNArgs(1),
	}
	root := cli.Root(c.Flags())
	records := cli.NewRecords(c, "KEY", "VALUE")
	c.RunE = func(c *cobra.Command, args []string) error {
		all, err := open(*root)
		if err != nil {
			return err
		}
		labels, err := cli.Labels(args[1:])
		if err != nil {
			return err
		}
		if len(labels) == 0 {
			labels, err = all.Labels(args[0])
		} else {
			labels, err = all.SetLabels(c.Context(), args[0], labels)
		}
		if err != nil {
			return err
		}
		return records.WriteLabels(labels)
	}
	return c
}

func newLs() *cobra.Command {
	c := &cobra.Command{
		Use:   "ls [flags]",
		Short: "list namespaces",
		Args:  cobra.NoArgs,
	}
	root := cli.Root(c.Flags())
	records := cli.NewRecords(c, "NAMESPACE", "LABELS")
	c.RunE = func(c *cobra.Command, _ []string) error {
		all, err := open(*root)
		if err != nil {
			return err
		}
		names, err := all.List()
		if err != nil {
			return err
		}
		for _, name := range names {
			labels, err := all.Labels(name)
			if err != nil {
				return err
			}
			record := struct {
				Name   string            `json:"name"`
				Labels map[string]string `json:"labels,omitempty"`
			}{name, labels}
			if err := records.Write(record, name, cli.LabelWords(labels)); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}

func newRm() *cobra.Command {
	c := &cobra.Command{
		Use:   "rm [flags] NAMESPACE…|-",
		Short: "remove namespaces that are empty",
		Args:  cobra.ArbitraryArgs,
	}
	root := cli.Root(c.Flags())
	c.RunE = func(c *cobra.Command, args []string) error {
		all, err := open(*root)
		if err != nil {
			return err
		}
		return cli.Each(c, args, func(name string) error {
			if err := all.Delete(c.Context(), name); err != nil {
				return err
			}
			_, err := fmt.Fprintln(c.OutOrStdout(), name)
			return err
		})
	}
	return c
}
