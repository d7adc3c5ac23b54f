"""What sessions are made in and of: containers, images, prototypes, providers; and who is logged in."""
