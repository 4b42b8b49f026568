"""What comes out, as messages: to subscribers, who may miss some, and to receivers, who may not."""
